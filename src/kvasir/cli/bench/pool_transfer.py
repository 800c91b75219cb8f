"""Measures the messenger between two processes of this machine, beside a plain socket and a memcpy in the same run."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import statistics
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import uvloop

from kvasir.cli.bench.sizes import MIB, SIZES, size_name
from kvasir.store.arena import Arena, create_arena, open_arena
from kvasir.store.copying import fastest_copy
from kvasir.store.messenger import PeerArena, ShmTransport, SpanPair, TcpServer, TcpTransport, host_identity
from kvasir.store.messenger.shm import copy_pieces
from kvasir.store.messenger.spans import cut
from kvasir.store.messenger.tcp_server import prepare

SLOT_BYTES = 16 * MIB
BATCH = 16
WAIT_S = 60.0

_COMMAND = struct.Struct("<BxxxxxxxQQ")  # put or get, offset, length
_GET, _PUT, _ACKNOWLEDGED = 0, 1, b"k"


@dataclass(frozen=True, slots=True)
class Measured:
    """GB/s by round, of one way to move the working set in pieces of one size."""

    name: str
    nbytes: int
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


@dataclass(frozen=True, slots=True)
class _Other:
    """The other process: its arena, its ticket for pushes, and the ports of its plain sockets, as they come and not paced."""

    peer: PeerArena
    ticket: bytes
    plain_port: int
    unpaced_port: int


def measure(*, working_set: int = 512 * MIB, rounds: int = 5, sizes: tuple[int, ...] = SIZES) -> list[Measured]:
    """All ways and sizes, once a round and one after the other, so that a busy machine is busy for all of them."""
    return uvloop.run(_measure(working_set, rounds, sizes))  # as the pool's process does


def ratios(measured: list[Measured]) -> dict[str, dict[str, float]]:
    """Ratio name → size → median over the rounds of ours over the limit measured in the same round."""
    by_name = {(m.name, m.nbytes): m.rounds for m in measured}
    result: dict[str, dict[str, float]] = {}
    for ours, limit in (
        ("tcp_put", "socket_put"),
        ("tcp_get", "socket_get"),
        ("tcp_put", "unpaced_put"),
        ("tcp_get", "unpaced_get"),
        ("shm_put", "memcpy"),
        ("shm_get", "memcpy"),
    ):
        over = f"{ours}_over_{limit.partition('_')[0]}"
        result[over] = {
            size_name(nbytes): round(statistics.median(a / b for a, b in zip(mine, by_name[limit, nbytes], strict=True)), 3)
            for (name, nbytes), mine in by_name.items()
            if name == ours
        }
    return result


async def _measure(working_set: int, rounds: int, sizes: tuple[int, ...]) -> list[Measured]:
    arena = _warm_arena(working_set, 1)
    with _other_process(working_set) as other:
        tcp, shm = TcpTransport(arena), ShmTransport(arena)
        theirs, buffers = open_arena(other.peer.arena), (arena.memory.copy(), arena.memory.copy())
        plain, unpaced = _connected(other.plain_port, lambda _: None), _connected(other.unpaced_port, prepare)
        ways = {
            "memcpy": _now(lambda spans: _memcpy(*buffers, spans)),
            "shm_get": lambda spans: shm.read(other.peer, spans, deadline_s=_soon()),
            "shm_put": _now(lambda spans: _copy(arena, theirs, spans)),
            "socket_get": _now(lambda spans: _plain(plain, _GET, arena, spans)),
            "tcp_get": lambda spans: tcp.read(other.peer, spans, deadline_s=_soon()),
            "unpaced_get": _now(lambda spans: _plain(unpaced, _GET, arena, spans)),
            "socket_put": _now(lambda spans: _plain(plain, _PUT, arena, spans)),
            "tcp_put": lambda spans: tcp.push(other.peer, spans, ticket=other.ticket, deadline_s=_soon()),
            "unpaced_put": _now(lambda spans: _plain(unpaced, _PUT, arena, spans)),
        }
        batched = {f"{name}_batch{BATCH}": ways[name] for name in ("tcp_get", "tcp_put")}
        speeds: dict[tuple[str, int], list[float]] = {}
        for _ in range(rounds + 1):
            for nbytes in sizes:
                for name, move in ways.items():
                    speeds.setdefault((name, nbytes), []).append(await _speed(move, working_set, nbytes, 1))
            for name, move in batched.items():
                speeds.setdefault((name, sizes[0]), []).append(await _speed(move, working_set, sizes[0], BATCH))
        plain.close()
        unpaced.close()
        await tcp.close()
        await shm.close()
    return [
        Measured(name, nbytes, tuple(all_rounds[1:])) for (name, nbytes), all_rounds in speeds.items()
    ]  # the first warms up


Move = Callable[[list[SpanPair]], Awaitable[None]]


async def _speed(move: Move, working_set: int, nbytes: int, batch: int) -> float:
    """GB/s of moving the whole working set, `batch` pieces at a time, one batch after the other."""
    spans = [SpanPair(at // SLOT_BYTES, at // SLOT_BYTES, at % SLOT_BYTES, nbytes) for at in range(0, working_set, nbytes)]
    batches = [spans[at : at + batch] for at in range(0, len(spans), batch)]
    started_s = time.perf_counter()
    for some in batches:
        await move(some)
    return working_set / (time.perf_counter() - started_s) / 1e9


def _now(move: Callable[[list[SpanPair]], None]) -> Move:
    async def moved(spans: list[SpanPair]) -> None:
        move(spans)

    return moved


def _soon() -> float:
    return asyncio.get_running_loop().time() + WAIT_S


def _warm_arena(working_set: int, value: int) -> Arena:
    arena = create_arena(working_set // SLOT_BYTES, SLOT_BYTES)
    arena.memory[:] = value
    return arena


def _memcpy(source: np.ndarray, target: np.ndarray, spans: list[SpanPair]) -> None:
    for slot, _, offset, length in spans:
        start = slot * SLOT_BYTES + offset
        np.copyto(target[start : start + length], source[start : start + length])


def _copy(source: Arena, target: Arena, spans: list[SpanPair]) -> None:
    """What an instance does that puts blocks into slots of its node's arena."""
    for piece in cut(spans, max_bytes=SLOT_BYTES, max_pieces=BATCH):
        copy_pieces(fastest_copy(), source, target, piece)


def _connected(port: int, before: Callable[[socket.socket], None]) -> socket.socket:
    sock = socket.socket()
    sock.settimeout(WAIT_S)
    before(sock)
    sock.connect(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _plain(sock: socket.socket, op: int, arena: Arena, spans: list[SpanPair]) -> None:
    memory = memoryview(arena.memory.data).cast("B")
    for slot, _, offset, length in spans:
        start = slot * SLOT_BYTES + offset
        sock.sendall(_COMMAND.pack(op, start, length))
        if op == _GET:
            _receive(sock, memory[start : start + length])
            continue
        sock.sendall(memory[start : start + length])
        _receive(sock, memoryview(bytearray(len(_ACKNOWLEDGED))))


def _receive(sock: socket.socket, into: memoryview) -> None:
    while into.nbytes:
        got = sock.recv_into(into, into.nbytes, socket.MSG_WAITALL)
        if not got:
            raise EOFError
        into = into[got:]


@contextmanager
def _other_process(working_set: int) -> Iterator[_Other]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, working_set), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(WAIT_S):
            raise TimeoutError("the other process of the benchmark did not start")
        yield here.recv()
    finally:
        here.close()  # it ends then
        process.join(WAIT_S)


def _serve(connection: Connection, working_set: int) -> None:
    arena = _warm_arena(working_set, 2)
    listening, unpaced = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    prepare(unpaced)
    for plain in (listening, unpaced):
        threading.Thread(target=_serve_plain, args=(plain, arena), daemon=True).start()

    async def serve() -> None:
        server = await TcpServer.start(arena, "127.0.0.1")
        peer = PeerArena("other", arena.handle, host_identity(), tcp=server.address)
        ports = (listening.getsockname()[1], unpaced.getsockname()[1])
        connection.send(_Other(peer, server.grant(range(arena.num_slots)), *ports))
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(connection.fileno(), ended.set)
        await ended.wait()
        await server.close()

    uvloop.run(serve())


def _serve_plain(listening: socket.socket, arena: Arena) -> None:
    """One client, blocking calls, an acknowledgement for each put: the least that a transfer can be from Python."""
    sock, _ = listening.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = memoryview(arena.memory.data).cast("B")
    raw = bytearray(_COMMAND.size)
    try:
        while True:
            _receive(sock, memoryview(raw))
            op, start, length = _COMMAND.unpack(raw)
            if op == _GET:
                sock.sendall(memory[start : start + length])
                continue
            _receive(sock, memory[start : start + length])
            sock.sendall(_ACKNOWLEDGED)
    except (EOFError, OSError):
        sock.close()
