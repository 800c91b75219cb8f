"""Two arenas with known bytes in one process, and a transport from one to the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import numpy as np

from kvasir.store.arena import Arena, create_arena
from kvasir.store.messenger import (
    PeerArena,
    ShmTransport,
    SpanPair,
    TcpLimits,
    TcpServer,
    TcpTransport,
    Transport,
    host_identity,
)

NUM_SLOTS = 24
SLOT_BYTES = 300_000  # no multiple of a page: between two slots lie bytes that nobody may touch
LIMITS = TcpLimits(slice_bytes=1 << 16, window_bytes=1 << 17, stall_s=0.5, connect_s=2.0)


@dataclass(frozen=True, slots=True)
class Bed:
    source: Arena
    target: Arena
    peer: PeerArena
    transport: Transport
    server: TcpServer


def filled(seed: int) -> Arena:
    """An arena of random bytes, the gaps between its slots included."""
    arena = create_arena(NUM_SLOTS, SLOT_BYTES)
    arena.memory[:] = np.random.default_rng(seed).integers(0, 256, arena.memory.nbytes, dtype=np.uint8)
    return arena


def soon(seconds: float = 20.0) -> float:
    return asyncio.get_running_loop().time() + seconds


def expected(target: np.ndarray, source: Arena, spans: list[SpanPair]) -> np.ndarray:
    """What the target's memory must be after the spans were read: naively, byte range by byte range."""
    after = target.copy()
    for remote_slot, local_slot, offset, length in spans:
        here, there = local_slot * source.stride + offset, remote_slot * source.stride + offset
        after[here : here + length] = source.memory[there : there + length]
    return after


@asynccontextmanager
async def bed(make: Callable[[Arena], Transport], *, stall_s: float = 5.0) -> AsyncIterator[Bed]:
    source, target = filled(1), filled(2)
    server = await TcpServer.start(source, "127.0.0.1", stall_s=stall_s)
    transport = make(target)
    serving = make(source)
    nixl = serving.address if serving.name == "nixl" else None  # type: ignore[attr-defined]
    peer = PeerArena("source", source.handle, host_identity(), tcp=server.address, nixl=nixl)
    try:
        yield Bed(source, target, peer, transport, server)
    finally:
        await transport.close()
        await serving.close()
        await server.close()
        source.close()
        target.close()


def tcp(target: Arena) -> TcpTransport:
    return TcpTransport(target, LIMITS)


def shm(target: Arena) -> ShmTransport:
    return ShmTransport(target)


def tcp_bed() -> AbstractAsyncContextManager[Bed]:
    return bed(tcp)
