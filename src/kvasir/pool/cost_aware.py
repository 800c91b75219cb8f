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

from kvasir.core.keys import BlockKey
from kvasir.costs.model import CostModel
from kvasir.pool.eviction import Block
from kvasir.pool.ghosts import Ghosts
from kvasir.pool.reuse import MAX_CLASS, SAMPLE, ReuseRates

BlockSeconds = Callable[[int], float]
"""Seconds to compute block `depth` of a sequence when all before it is in place; never less for a deeper one."""

COST_CLASSES = 8
"""Half octaves of recompute seconds that are told apart, from the first block's on."""

_NUM_CLASSES = (MAX_CLASS + 1) * COST_CLASSES
_USES_CLASS = tuple(c // COST_CLASSES for c in range(_NUM_CLASSES))
_RELATIVE_COST = tuple(2 ** (c % COST_CLASSES / 2) for c in range(_NUM_CLASSES))

_MANY_USES = 1 << MAX_CLASS - 1
_CLASS_OF_USES = [min(uses.bit_length(), MAX_CLASS) for uses in range(_MANY_USES + 1)]


def block_seconds(costs: CostModel, block_tokens: int) -> BlockSeconds:
    """As the cost model predicts it for blocks of `block_tokens`."""
    return lambda depth: costs.prefill_s(block_tokens, depth * block_tokens)


class CostAware:
    """O(1) a block; a first victim at some time costs one look at each class in use, further ones at that time O(1)."""

    def __init__(self, seconds: BlockSeconds):
        self._seconds = seconds
        self._rates = ReuseRates()
        self._ghosts: Ghosts[int] = Ghosts()
        self._classes: list[OrderedDict[int, Block]] = [OrderedDict() for _ in range(_NUM_CLASSES)]
        self._class_of_depth: list[int] = []
        self._num_known = 0  # blocks that have been idle in their slot
        self._len = 0
        self._order: list[tuple[float, int]] = []  # worths of the heads of classes as of _order_now, best first
        self._order_now = math.nan

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[int]:
        for members in self._classes:
            yield from members

    def add(self, slots: Sequence[int], blocks: Sequence[Block], now: float) -> None:
        classes, released = self._classes, self._rates.released
        if new := [block for block in blocks if block.class_ is None]:
            self._meet(new, now)
        cost_class_of = self._cost_classes(max([block.deepest for block in blocks], default=0))
        for slot, block in zip(slots, blocks, strict=True):
            uses_class = _CLASS_OF_USES[min(block.past_uses + block.uses, _MANY_USES)]
            block.class_ = class_ = uses_class * COST_CLASSES + cost_class_of[block.deepest]
            block.idle_since = now
            classes[class_][slot] = block
            if block.is_watched:
                released(block.key, uses_class, now)
        self._len += len(slots)
        self._order_now = math.nan

    def remove(self, slots: Sequence[int], blocks: Sequence[Block], now: float) -> None:
        classes, used = self._classes, self._rates.used
        for slot, block in zip(slots, blocks, strict=True):
            del classes[block.class_][slot]  # type: ignore[index]  # a block that is idle has a class
            if block.is_watched:
                used(block.key, now)
        self._len -= len(slots)
        self._order_now = math.nan

    def forget(self, slot: int, block: Block, now: float) -> None:
        assert block.class_ is not None, "a block that is idle has a class"
        del self._classes[block.class_][slot]
        block.class_ = None
        self._len -= 1
        self._num_known -= 1
        self._order_now = math.nan

    def victims(self, count: int, now: float) -> list[int]:
        count = min(count, self._len)
        if self._order_now != now:
            self._order_now = now
            self._order = self._heads(now)
        order, classes = self._order, self._classes
        slots: list[int] = []
        gone: list[tuple[BlockKey, int]] = []
        while count:
            class_ = order[-1][1]
            members = classes[class_]
            slot, block = members.popitem(last=False)
            slots.append(slot)
            gone.append((block.key, block.past_uses + block.uses))
            count -= 1
            if not members:
                order.pop()
            elif next(iter(members.values())).idle_since != block.idle_since:  # else it is worth as much and stays first
                order.pop()
                self._reinsert(self._worth(class_, members, now), class_)
        self._num_known -= len(slots)
        self._ghosts.leave(gone, self._num_known)
        self._len -= len(slots)
        return slots

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
        heads, rate = [], self._rates.rate
        for class_, members in enumerate(self._classes):
            if members:
                age_s = now - next(iter(members.values())).idle_since
                heads.append((rate(_USES_CLASS[class_], age_s) * _RELATIVE_COST[class_], class_))
        heads.sort(reverse=True)
        return heads

    def _worth(self, class_: int, members: OrderedDict[int, Block], now: float) -> float:
        """Of the head of a class: seconds saved per second, relative to the first block's."""
        age_s = now - next(iter(members.values())).idle_since
        return self._rates.rate(_USES_CLASS[class_], age_s) * _RELATIVE_COST[class_]

    def _reinsert(self, worth: float, class_: int) -> None:
        """Into the order of heads, which is short; mostly the class stays first."""
        order = self._order
        place = len(order)
        while place and order[place - 1] < (worth, class_):
            place -= 1
        order.insert(place, (worth, class_))

    def _cost_classes(self, depth: int) -> list[int]:
        """The class of costs of each depth, at least up to this one."""
        known = self._class_of_depth
        while len(known) <= depth:
            ratio = self._seconds(len(known)) / self._seconds(0)
            known.append(min(COST_CLASSES - 1, max(known[-1] if known else 0, int(2 * math.log2(max(1.0, ratio))))))
        return known
