"""Mooncake Store over TCP, the segment in another process: `python -m benchmarks.peers.mooncake_store [MIB]`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.peers import timing
from benchmarks.peers.timing import KIB, MIB, SIZES, require

MASTER_PORT = 50951
ROOM = 4
"""How much larger its segment is than the working set: it evicts early."""


def main() -> None:
    nbytes = timing.working_set()
    with master(), timing.second_process(serve, nbytes):
        store = connect(0, 64 * MIB)
        memory = timing.warm(nbytes)
        here = timing.address(memory)
        require(store.register_buffer(here, nbytes))
        speeds: dict[str, float] = {}
        for number in range(2):
            for size in SIZES:
                for name, width in (("", 1), ("_batch16", timing.BATCH)):
                    keys = f"{number}/{name}/{size}"
                    put, get = partial(put_some, store, keys, here), partial(get_some, store, keys, here)
                    speeds[f"put{name} {size // KIB} KiB"] = round(timing.speed(put, nbytes, size, width), 3)
                    speeds[f"get{name} {size // KIB} KiB"] = round(timing.speed(get, nbytes, size, width), 3)
                    store.remove_all(True)
        timing.print_line(speeds)
        store.close()


def put_some(store: Any, keys: str, here: int, offsets: list[int], size: int) -> None:
    if len(offsets) == 1:
        require(store.put_from(f"{keys}/{offsets[0]}", here + offsets[0], size))
        return
    for result in store.batch_put_from(
        [f"{keys}/{at}" for at in offsets], [here + at for at in offsets], [size] * len(offsets)
    ):
        require(result)


def get_some(store: Any, keys: str, here: int, offsets: list[int], size: int) -> None:
    if len(offsets) == 1:
        require(store.get_into(f"{keys}/{offsets[0]}", here + offsets[0], size))
        return
    for result in store.batch_get_into(
        [f"{keys}/{at}" for at in offsets], [here + at for at in offsets], [size] * len(offsets)
    ):
        require(result)


def serve(connection: Connection, nbytes: int) -> None:
    store = connect(ROOM * nbytes, 16 * MIB)
    connection.send("ready")
    timing.wait_for_end(connection)
    store.close()


def connect(segment: int, buffer: int) -> Any:
    os.environ["MC_TCP_BIND_ADDRESS"] = "127.0.0.1"
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    from mooncake.store import MooncakeDistributedStore  # reads the environment

    store = MooncakeDistributedStore()
    require(-abs(store.setup("127.0.0.1", "P2PHANDSHAKE", segment, buffer, "tcp", "", f"127.0.0.1:{MASTER_PORT}")))
    return store


@contextmanager
def master() -> Iterator[None]:
    """Its metadata service, kept on loopback: by default it listens everywhere."""
    command = [
        str(Path(sys.executable).parent / "mooncake_master"),
        f"--rpc_port={MASTER_PORT}",
        "--rpc_address=127.0.0.1",
        "--metrics_host=127.0.0.1",
        "--http_metadata_server_host=127.0.0.1",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for_port(MASTER_PORT)
            yield
        finally:
            process.terminate()


def wait_for_port(port: int) -> None:
    give_up_s = time.monotonic() + timing.WAIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            if time.monotonic() > give_up_s:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    main()
