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
from collections.abc import Callable, Iterator

from kvasir.core.keys import BlockKey
from kvasir.costs.model import CostModel
from kvasir.pool.eviction import Block
from kvasir.pool.ghosts import Ghosts
from kvasir.pool.reuse import MAX_CLASS, ReuseRates

BlockSeconds = Callable[[int], float]
"""Seconds to compute block `depth` of a sequence when all before it is in place; never less for a deeper one."""

COST_CLASSES = 8
"""Half octaves of recompute seconds that are told apart, from the first block's on."""

_NUM_CLASSES = (MAX_CLASS + 1) * COST_CLASSES
_USES_CLASS = tuple(c // COST_CLASSES for c in range(_NUM_CLASSES))
_RELATIVE_COST = tuple(2 ** (c % COST_CLASSES / 2) for c in range(_NUM_CLASSES))


def block_seconds(costs: CostModel, block_tokens: int) -> BlockSeconds:
    """As the cost model predicts it for blocks of `block_tokens`."""
    return lambda depth: costs.prefill_s(block_tokens, depth * block_tokens)


class _Stay:
    """A block's stay in a slot: uses of its earlier stays, and since when and in which class it is idle."""

    __slots__ = ("class_", "idle_since", "is_watched", "key", "past_uses", "total_uses")

    def __init__(self, key: BlockKey, past_uses: int, is_watched: bool):
        self.key = key
        self.is_watched = is_watched
        self.past_uses = past_uses
        self.total_uses = past_uses
        self.idle_since = 0.0
        self.class_ = 0


class CostAware:
    """O(1) a block; a first victim at some time costs one look at each class in use, further ones at that time O(1)."""

    def __init__(self, seconds: BlockSeconds):
        self._seconds = seconds
        self._rates = ReuseRates()
        self._stays: dict[int, _Stay] = {}
        self._ghosts: Ghosts[int] = Ghosts()
        self._classes: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(_NUM_CLASSES)]
        self._class_of_depth: list[int] = []
        self._len = 0
        self._order: list[tuple[float, int]] = []  # worths of the heads of classes as of _order_now, best first
        self._order_now = math.nan

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[int]:
        for members in self._classes:
            yield from members

    def add(self, slot: int, block: Block, now: float) -> None:
        key = block.key
        stay = self._stays.get(slot)
        if stay is None or stay.key != key:
            stay = self._stays[slot] = _Stay(key, self._ghosts.recall(key) or 0, self._rates.watches(key))
            if stay.is_watched:
                self._rates.used(key, now)
        stay.total_uses = uses = stay.past_uses + block.uses
        stay.idle_since = now
        uses_class = min(uses.bit_length(), MAX_CLASS)
        known, depth = self._class_of_depth, block.deepest
        stay.class_ = class_ = uses_class * COST_CLASSES + (known[depth] if depth < len(known) else self._cost_class(depth))
        self._classes[class_][slot] = None
        self._len += 1
        self._order_now = math.nan
        if stay.is_watched:
            self._rates.released(key, uses_class, now)

    def remove(self, slot: int, now: float) -> None:
        stay = self._leave_class(slot)
        if stay.is_watched:
            self._rates.used(stay.key, now)

    def forget(self, slot: int, now: float) -> None:
        self._leave_class(slot)
        del self._stays[slot]

    def victim(self, now: float) -> int | None:
        if not self._len:
            return None
        if self._order_now != now:
            self._order_now = now
            self._order = sorted(
                [(self._worth(c, members, now), c) for c, members in enumerate(self._classes) if members], reverse=True
            )
        order, stays = self._order, self._stays
        class_ = order[-1][1]
        members = self._classes[class_]
        slot = members.popitem(last=False)[0]
        self._len -= 1
        stay = stays.pop(slot)
        if not members:
            order.pop()
        elif stays[next(iter(members))].idle_since != stay.idle_since:  # else it is worth as much, and the class stays first
            order.pop()
            self._reinsert(self._worth(class_, members, now), class_)
        self._ghosts.leave(stay.key, stay.total_uses, len(stays))
        return slot

    def _leave_class(self, slot: int) -> _Stay:
        stay = self._stays[slot]
        del self._classes[stay.class_][slot]
        self._len -= 1
        self._order_now = math.nan
        return stay

    def _worth(self, class_: int, members: OrderedDict[int, None], now: float) -> float:
        """Of the head of a class: seconds saved per second, relative to the first block's."""
        age_s = now - self._stays[next(iter(members))].idle_since
        return self._rates.rate(_USES_CLASS[class_], age_s) * _RELATIVE_COST[class_]

    def _reinsert(self, worth: float, class_: int) -> None:
        """Into the order of heads, which is short; mostly the class stays first."""
        order = self._order
        place = len(order)
        while place and order[place - 1] < (worth, class_):
            place -= 1
        order.insert(place, (worth, class_))

    def _cost_class(self, depth: int) -> int:
        known = self._class_of_depth
        while len(known) <= depth:
            ratio = self._seconds(len(known)) / self._seconds(0)
            known.append(min(COST_CLASSES - 1, max(known[-1] if known else 0, int(2 * math.log2(max(1.0, ratio))))))
        return known[depth]
