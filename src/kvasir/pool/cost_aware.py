"""Cost-aware eviction: what goes first is what saves the fewest seconds of recompute per second of keeping it.

Every block takes the same bytes, so a block's worth per byte and second is (chance that it is used within the next second)
times (seconds to compute it again). The chance is learnt here, by number of uses and time since the last one; the seconds come
from a cost model and grow with depth, because attention reads all that is before. A block counts with the seconds of the
deepest block of its sequences (`Block.deepest`), which stand and fall with it.

Blocks of like worth share a class, in order of release, so a victim is the head of some class: the one of least worth now. The
worth never decreases with uses and depth nor increases with age, and ties go to the lower class: so suffixes go first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

from kvasir.costs.model import CostModel
from kvasir.costs.quick import quick
from kvasir.pool.eviction import Block
from kvasir.pool.ghosts import Ghosts
from kvasir.pool.reuse import MAX_CLASS, SAMPLE, ReuseRates
from kvasir.pool.runs import Run, RunQueue

BlockSeconds = Callable[[int], float]
"""Seconds to compute block `depth` of a sequence when all before it is in place; never less for a deeper one."""

COST_CLASSES: Final = 8
"""Half octaves of recompute seconds that are told apart, from the first block's on."""

_MANY_USES: Final = 1 << MAX_CLASS - 1
_FIRST_OF_MANY: Final = COST_CLASSES * MAX_CLASS
"""The class of least costs of blocks with so many uses."""


def block_seconds(costs: CostModel, block_tokens: int) -> BlockSeconds:
    """As the cost model predicts it for blocks of `block_tokens`."""
    known = quick(costs)
    return lambda depth: known.prefill_s(block_tokens, depth * block_tokens)


class CostAware:
    """O(1) a block, and most of it is done for runs of blocks; to evict costs one look at each class beside, and one at all of
    them for each run that goes.
    """

    def __init__(self, seconds: BlockSeconds):
        self._seconds = seconds
        self._rates = ReuseRates()
        self._ghosts: Ghosts[int] = Ghosts()
        self._classes = [RunQueue(uses, 2 ** (cost / 2)) for uses in range(MAX_CLASS + 1) for cost in range(COST_CLASSES)]
        self._class_of_depth: list[int] = []
        self._num_known = 0
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Block]:
        for runs in self._classes:
            for run in runs:
                yield from run.blocks

    def add(self, blocks: list[Block], now: float) -> None:
        for block in blocks:
            if not block.is_known:
                self._meet(block, now)
        run: Run | None = None
        class_, uses, deepest = 0, 0, 0
        for block in blocks:
            if run is None or block.uses + block.past_uses != uses or block.deepest != deepest:  # mostly as the one before
                uses, deepest = block.uses + block.past_uses, block.deepest
                class_ = self._class_of(uses, deepest)
                if run is None or run.class_ != class_:
                    run = Run(class_, now)
                    self._classes[class_].append(run)
            run.blocks.append(block)
            block.run = run
            if block.is_watched:
                self._rates.released(block.key, class_ // COST_CLASSES, now)
        self._len += len(blocks)

    def remove(self, blocks: list[Block], now: float) -> None:
        for block in blocks:
            self._leave_run(block)
            if block.is_watched:
                self._rates.used(block.key, now)
        self._len -= len(blocks)

    def forget(self, block: Block, now: float) -> None:
        self._leave_run(block)
        block.is_known = False
        self._len -= 1
        self._num_known -= 1

    def _leave_run(self, block: Block) -> None:
        run = block.run
        assert run is not None, "a block that is idle is in a run"
        block.run = None
        blocks = run.blocks
        if blocks[-1] is block:
            blocks.pop()
        else:
            blocks.remove(block)
        if not blocks:
            self._classes[run.class_].remove(run)

    def victims(self, count: int, now: float) -> list[Block]:
        count = min(count, self._len)
        gone: list[Block] = []
        while count > len(gone):
            run = self._least_worth(now)
            end = count - len(gone)
            if end < len(run.blocks):
                gone += run.blocks[:end]
                del run.blocks[:end]
            else:
                gone += run.blocks
                run.blocks = []
                self._classes[run.class_].remove(run)
        for block in gone:
            block.run = None
            self._ghosts.leave(block.key, block.past_uses + block.uses)
        self._num_known -= len(gone)
        self._ghosts.trim(self._num_known)
        self._len -= len(gone)
        return gone

    def _least_worth(self, now: float) -> Run:
        """Which run goes next; there must be one.

        A class is worth, by its oldest run, seconds saved per second, relative to the first block's.
        """
        best: Run | None = None
        least = 0.0
        for runs in self._classes:
            run = runs.first
            if run is None:
                continue
            worth = self._rates.rate(runs.uses_class, now - run.since_s) * runs.relative_cost
            if best is None or worth < least:
                best, least = run, worth
        assert best is not None, "whoever asks knows of idle blocks"
        return best

    def _class_of(self, uses: int, deepest: int) -> int:
        if deepest >= len(self._class_of_depth):
            self._reach(deepest)
        return (COST_CLASSES * uses.bit_length() if uses < _MANY_USES else _FIRST_OF_MANY) + self._class_of_depth[deepest]

    def _meet(self, block: Block, now: float) -> None:
        """It is idle for the first time in its slot."""
        self._num_known += 1
        block.is_known = True
        block.past_uses = self._ghosts.recall(block.key) or 0
        if block.key[0] % SAMPLE == 0:
            block.is_watched = True
            self._rates.used(block.key, now)

    def _reach(self, depth: int) -> None:
        """Work out the classes of costs of all depths up to this one."""
        known, first_s = self._class_of_depth, self._seconds(0)
        while len(known) <= depth:
            ratio = self._seconds(len(known)) / first_s
            known.append(min(COST_CLASSES - 1, max(known[-1] if known else 0, int(2 * math.log2(max(1.0, ratio))))))
