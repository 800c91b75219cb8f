"""What is particular to shared memory; the rest is in test_contract.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvasir.store.messenger import PeerArena, SpanPair
from kvasir.store.messenger import shm as module
from tests.store.messenger.beds import bed, filled, shm, soon


def num_mapped() -> int:
    """Arenas that this process maps."""
    return Path("/proc/self/maps").read_text().count("kvasir-arena")


async def test_an_arena_that_is_gone_does_not_stay_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.05)
    async with bed(shm) as it:
        other = filled(3)
        before = num_mapped()
        for arena in (other.handle, it.peer.arena):
            await it.transport.read(PeerArena("other", arena, it.peer.host), [SpanPair(0, 0, 0, 100)], deadline_s=soon())
        assert num_mapped() == before + 2
        other.close()
        for _ in range(100):
            await asyncio.sleep(0.05)
            if num_mapped() == before + 1:
                break
        assert num_mapped() == before + 1
