"""NIXL's own troubles: a late write is fenced off, a dead or another agent is noticed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from kvasir.core.errors import TransferError
from kvasir.store.messenger import PeerArena, SpanPair
from tests.store.messenger.beds import NUM_SLOTS, SLOT_BYTES, filled, soon
from tests.store.stopping import stop

pytest.importorskip("nixl", reason="the optional NIXL is not installed: pip install nixl nixl-cu12 --no-deps")
from kvasir.store.messenger.nixl import NixlTransport

ALL = [SpanPair(slot, slot, 0, SLOT_BYTES) for slot in range(NUM_SLOTS)]

OTHER_PROCESS = """
import asyncio, sys, msgspec
from kvasir.store.arena import create_arena
from kvasir.store.messenger import PeerArena, host_identity
from kvasir.store.messenger.nixl import NixlTransport

async def main():
    arena = create_arena(NUM_SLOTS, SLOT_BYTES)
    arena.memory[:] = 7
    transport = NixlTransport(arena)
    peer = PeerArena("other", arena.handle, host_identity(), nixl=transport.address)
    print("peer", msgspec.json.encode(peer).decode(), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
""".replace("NUM_SLOTS", str(NUM_SLOTS)).replace("SLOT_BYTES", str(SLOT_BYTES))


@contextmanager
def other_process() -> Iterator[tuple[subprocess.Popen[bytes], PeerArena]]:
    with subprocess.Popen([sys.executable, "-c", OTHER_PROCESS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            line = next(line for line in process.stdout if line.startswith(b"peer "))
            yield process, msgspec.json.decode(line[5:], type=PeerArena)
        finally:
            process.kill()


@pytest.fixture(params=["tcp", "all"])
def ucx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of UCX that this machine has: over its TCP, the target does the copying in software; else the kernel does."""
    monkeypatch.setenv("UCX_TLS", request.param)
    return str(request.param)


async def test_another_process_is_read_and_its_death_noticed(ucx: str) -> None:
    target = filled(2)
    transport = NixlTransport(target)
    with other_process() as (process, peer):
        await transport.read(peer, ALL, deadline_s=soon(60))
        assert all((target.slot(slot) == 7).all() for slot in range(NUM_SLOTS))
        process.kill()
        process.wait(10)
        await asyncio.sleep(0.2)
        with pytest.raises(TransferError) as raised:
            await transport.read(peer, ALL, deadline_s=soon(20))
        assert raised.value.cause in ("cut", "refused", "stalled")
    await transport.close()


@pytest.mark.parametrize("ends", ["deadline", "cancelled"])
async def test_after_a_read_from_a_stopped_peer_nobody_writes(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    target = filled(2)
    transport = NixlTransport(target, settle_s=0.2)
    with other_process() as (process, peer):
        await transport.read(peer, ALL[:1], deadline_s=soon(60))
        before = transport.address
        stop(process.pid)
        task = asyncio.create_task(transport.read(peer, ALL, deadline_s=soon(0.5 if ends == "deadline" else 30.0)))
        await asyncio.sleep(0.1)
        if ends == "cancelled":
            task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, TransferError if ends == "deadline" else asyncio.CancelledError), outcome
        target.memory[:] = 3
        process.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.5)
        assert (target.memory == 3).all()
        assert transport.address != before, "a new agent took over"
    with other_process() as (_, peer):
        await transport.read(peer, ALL, deadline_s=soon(60))
        assert all((target.slot(slot) == 7).all() for slot in range(NUM_SLOTS))
    await transport.close()
