"""What the drivers of the messenger's peers share: buffers, rounds, and the second process."""

from __future__ import annotations

import json
import multiprocessing
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

KIB, MIB = 1 << 10, 1 << 20
SIZES = (64 * KIB, MIB, 16 * MIB)
BATCH = 16
WAIT_S = 60.0

Move = Callable[[list[int], int], object]
"""Moves the pieces that begin at these offsets, each so long."""

SocketMove = Callable[[socket.socket, memoryview, list[int], int], object]
"""The same, between this memory and who is at the socket's other end."""


def working_set() -> int:
    return int(sys.argv[1]) * MIB if len(sys.argv) > 1 else 512 * MIB


def warm(nbytes: int) -> npt.NDArray[np.uint8]:
    memory = np.empty(nbytes, dtype=np.uint8)
    memory[:] = 1
    return memory


def address(memory: npt.NDArray[np.uint8]) -> int:
    return int(memory.ctypes.data)


def report(ways: Mapping[str, tuple[Move, int]], nbytes: int, sizes: tuple[int, ...] = SIZES) -> None:
    """Print GB/s of each way (its move, and how many pieces it takes at a time) and size, of the second of two turns."""
    speeds: dict[str, float] = {}
    for _ in range(2):
        for name, (move, batch) in ways.items():
            for size in sizes:
                speeds[f"{name} {size // KIB} KiB"] = round(speed(move, nbytes, size, batch), 3)
    print_line(speeds)


def print_line(speeds: dict[str, float]) -> None:
    print(json.dumps(speeds), flush=True)


def speed(move: Move, nbytes: int, size: int, batch: int) -> float:
    offsets = list(range(0, nbytes, size))
    batches = [offsets[at : at + batch] for at in range(0, len(offsets), batch)]
    started_s = time.perf_counter()
    for some in batches:
        move(some, size)
    return nbytes / (time.perf_counter() - started_s) / 1e9


def report_socket(
    port: int, put: SocketMove, get: SocketMove, clear: Callable[[socket.socket], None] = lambda sock: None
) -> None:
    """As `report`, of a server on loopback that is spoken to by a raw socket; `clear` empties it after each size."""
    nbytes = working_set()
    memory = memoryview(warm(nbytes).data).cast("B")
    speeds: dict[str, float] = {}
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            for size in SIZES:
                for name, width in (("", 1), (f"_batch{BATCH}", BATCH)):
                    for way, move in (("put", put), ("get", get)):
                        found = speed(partial(move, sock, memory), nbytes, size, width)
                        speeds[f"{way}{name} {size // KIB} KiB"] = round(found, 3)
                clear(sock)
    print_line(speeds)


def require(result: int) -> None:
    """Mooncake answers with a negative number when it fails."""
    if result < 0:
        raise RuntimeError(f"the peer answered {result}")


@contextmanager
def second_process(serve: Callable[[Connection, int], None], nbytes: int) -> Iterator[Any]:
    """What `serve` sends first; it runs until its connection ends."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, nbytes), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(WAIT_S):
            raise TimeoutError("the second process did not start")
        yield here.recv()
    finally:
        here.close()
        process.join(5.0)
        process.kill()


def wait_for_end(connection: Connection) -> None:
    try:
        connection.recv()
    except EOFError:
        return
