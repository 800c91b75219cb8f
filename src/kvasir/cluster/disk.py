"""The SSD of a pool's body: blocks between the arena and the SSD tier's file, by its workers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack

from kvasir.cluster.pool_host import MESSENGER, MESSENGER_EPOCH, PoolHost
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import Erase, Spill, SpillDone, SsdFound
from kvasir.pool.node import MAX_SPILLING
from kvasir.store.ssd import SsdFile, SsdOutcome, SsdQueues, SsdRead, SsdWorkers, SsdWrite

SPILLING_BYTES = 8 << 20
"""Of small blocks so much is on its way to the SSD at a time: with 2 MiB the disk waited for the loop's next turn."""


def max_spilling(slot_bytes: int) -> int:
    """How many blocks of this size the brain may have written at a time; the workers have room for all of them."""
    return max(MAX_SPILLING, min(SsdQueues().max_writes, SPILLING_BYTES // slot_bytes))


class SsdDisk:
    """Implements `Disk`, and does what the brain wants done."""

    def __init__(self, host: PoolHost, file: SsdFile, workers: SsdWorkers):
        self._host = host
        self._file = file
        self._workers = workers

    def do(self, order: Spill | Erase) -> None:
        """Write a block, and tell the brain when its slot may be used again; or erase some, before any write over them."""
        if isinstance(order, Erase):
            self._file.forget(order.ssd_slots)
        else:
            self._spill(order)

    def _spill(self, spill: Spill) -> None:

        def done(outcome: SsdOutcome) -> None:
            self._host.handle(SpillDone(MESSENGER, MESSENGER_EPOCH, spill.ssd_slot, outcome is SsdOutcome.OK))

        data = self._host.arena.slot(spill.slot)
        self._workers.submit_write(SsdWrite(spill.ssd_slot, spill.key, spill.depth, data), done)

    async def read(self, blocks: Sequence[tuple[int, BlockKey, int]]) -> tuple[int, ...]:
        arena = self._host.arena
        outcomes = await self._workers.read([SsdRead(ssd_slot, key, arena.slot(slot)) for ssd_slot, key, slot in blocks])
        return tuple([block[0] for block, outcome in zip(blocks, outcomes, strict=True) if outcome is not SsdOutcome.OK])


async def start_disk(host: PoolHost, file: SsdFile, stack: AsyncExitStack) -> SsdDisk:
    """Tell the brain what an earlier run left, and take its orders from now on."""
    stack.callback(file.close)
    disk = SsdDisk(host, file, await stack.enter_async_context(SsdWorkers(file)))
    host.on_disk = disk.do
    host.handle(SsdFound(MESSENGER, MESSENGER_EPOCH, tuple(file.recover())))
    return disk
