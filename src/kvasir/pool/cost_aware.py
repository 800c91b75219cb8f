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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from kvasir.costs.model import CostModel
from kvasir.pool.eviction import Block
from kvasir.pool.ghosts import Ghosts
from kvasir.pool.reuse import AGES, MAX_CLASS, SAMPLE, TICKS_PER_SECOND, ReuseRates

BlockSeconds = Callable[[int], float]
"""Seconds to compute block `depth` of a sequence when all before it is in place; never less for a deeper one."""

COST_CLASSES: Final = 8
"""Half octaves of recompute seconds that are told apart, from the first block's on."""

_NUM_CLASSES: Final = (MAX_CLASS + 1) * COST_CLASSES
_USES_CLASS = tuple(c // COST_CLASSES for c in range(_NUM_CLASSES))
_RELATIVE_COST = tuple(2 ** (c % COST_CLASSES / 2) for c in range(_NUM_CLASSES))

_MANY_USES: Final = 1 << MAX_CLASS - 1
_FIRST_OF_MANY: Final = COST_CLASSES * MAX_CLASS
"""The class of least costs of blocks with so many uses."""


def block_seconds(costs: CostModel, block_tokens: int) -> BlockSeconds:
    """As the cost model predicts it for blocks of `block_tokens`."""
    return lambda depth: costs.prefill_s(block_tokens, depth * block_tokens)


class _Run:
    """Idle blocks of one sequence that were released together and are of one class, deepest first.

    What is evicted goes from its start, and what is leased again, a prefix of the sequence, from its end.
    """

    __slots__ = ("blocks", "since", "slots")

    def __init__(self, since: float):
        self.slots: list[int] = []
        self.blocks: list[Block] = []
        self.since = since


class CostAware:
    """O(1) a block, and most of it is done for runs of blocks; a first victim at some time costs one look at each class in
    use, further ones at that time O(1).
    """

    def __init__(self, seconds: BlockSeconds):
        self._seconds = seconds
        self._rates = ReuseRates()
        self._ghosts: Ghosts[int] = Ghosts()
        self._classes: list[OrderedDict[int, _Run]] = [OrderedDict() for _ in range(_NUM_CLASSES)]  # by number, oldest first
        self._num_runs = 0  # so far, which numbers the next; a block notes in which it is
        self._class_of_depth: list[int] = []
        self._num_known = 0  # blocks that have been idle in their slot
        self._len = 0
        self._order: list[tuple[float, int]] = []  # worths of the heads of classes as of _order_now, best first
        self._order_now = math.nan

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[int]:
        for runs in self._classes:
            for run in runs.values():
                yield from run.slots

    def add(self, slots: Sequence[int], blocks: Sequence[Block], now: float) -> None:
        if new := [block for block in blocks if block.class_ is None]:
            self._meet(new, now)
        self._reach(blocks)
        run, class_ = None, -1
        for place, block in enumerate(blocks):
            its_class = self._class_of(block)
            if run is None or its_class != class_:
                class_ = its_class
                self._num_runs += 1
                run = self._classes[class_][self._num_runs] = _Run(now)
            run.slots.append(slots[place])
            run.blocks.append(block)
            block.class_, block.run = class_, self._num_runs
            if block.is_watched:
                self._rates.released(block.key, class_ // COST_CLASSES, now)
        self._len += len(slots)
        self._order_now = math.nan

    def remove(self, slots: Sequence[int], blocks: Sequence[Block], now: float) -> None:
        for place, block in enumerate(blocks):
            self._leave_run(slots[place], block)
            if block.is_watched:
                self._rates.used(block.key, now)
        self._len -= len(slots)
        self._order_now = math.nan

    def forget(self, slot: int, block: Block, now: float) -> None:
        self._leave_run(slot, block)
        block.class_ = None
        self._len -= 1
        self._num_known -= 1
        self._order_now = math.nan

    def _leave_run(self, slot: int, block: Block) -> None:
        assert block.class_ is not None, "a block that is idle has a class"
        runs = self._classes[block.class_]
        run = runs[block.run]
        place = -1 if run.slots[-1] == slot else run.slots.index(slot)
        del run.slots[place], run.blocks[place]
        if not run.slots:
            del runs[block.run]

    def victims(self, count: int, now: float) -> list[int]:
        count = min(count, self._len)
        if self._order_now != now:
            self._order_now = now
            self._order = self._heads(now)
        order, classes = self._order, self._classes
        slots: list[int] = []
        blocks: list[Block] = []
        while count > len(slots):
            class_ = order[-1][1]
            runs = classes[class_]
            number, run = next(iter(runs.items()))
            end = count - len(slots)
            if end < len(run.slots):
                slots += run.slots[:end]
                blocks += run.blocks[:end]
                del run.slots[:end], run.blocks[:end]
                break
            slots += run.slots
            blocks += run.blocks
            del runs[number]
            if not runs:
                order.pop()
            elif next(iter(runs.values())).since != run.since:  # else it is worth as much, and the class stays first
                order.pop()
                self._reinsert(self._worth(class_, runs, now), class_)
        self._num_known -= len(slots)
        self._ghosts.leave([(block.key, block.past_uses + block.uses) for block in blocks], self._num_known)
        self._len -= len(slots)
        return slots

    def _class_of(self, block: Block) -> int:
        """Its depth must be within reach."""
        uses = block.past_uses + block.uses
        return (COST_CLASSES * uses.bit_length() if uses < _MANY_USES else _FIRST_OF_MANY) + self._class_of_depth[block.deepest]

    def _meet(self, blocks: list[Block], now: float) -> None:
        """These are idle for the first time in their slots."""
        self._num_known += len(blocks)
        keys = [block.key for block in blocks]
        if self._ghosts.has_any(keys):
            for block in blocks:
                block.past_uses = self._ghosts.recall(block.key) or 0
        for block in blocks:
            if block.key[0] % SAMPLE == 0:
                block.is_watched = True
                self._rates.used(block.key, now)

    def _heads(self, now: float) -> list[tuple[float, int]]:
        """The worths of the heads of classes, best first."""
        heads, table = [], self._rates.table
        for class_, runs in enumerate(self._classes):
            if runs:
                octave = int((now - next(iter(runs.values())).since) * TICKS_PER_SECOND).bit_length()  # as ReuseRates.rate
                rate = table[_USES_CLASS[class_]][octave if octave < AGES else -1]
                heads.append((rate * _RELATIVE_COST[class_], class_))
        heads.sort(reverse=True)
        return heads

    def _worth(self, class_: int, runs: OrderedDict[int, _Run], now: float) -> float:
        """Of the head of a class: seconds saved per second, relative to the first block's."""
        return self._rates.rate(_USES_CLASS[class_], now - next(iter(runs.values())).since) * _RELATIVE_COST[class_]

    def _reinsert(self, worth: float, class_: int) -> None:
        """Into the order of heads, which is short; mostly the class stays first."""
        order = self._order
        place = len(order)
        while place and order[place - 1] < (worth, class_):
            place -= 1
        order.insert(place, (worth, class_))

    def _reach(self, blocks: Sequence[Block]) -> None:
        """Work out the classes of costs of all depths up to those of these blocks."""
        known, depth = self._class_of_depth, 0
        for block in blocks:
            if block.deepest > depth:
                depth = block.deepest
        while len(known) <= depth:
            ratio = self._seconds(len(known)) / self._seconds(0)
            known.append(min(COST_CLASSES - 1, max(known[-1] if known else 0, int(2 * math.log2(max(1.0, ratio))))))
