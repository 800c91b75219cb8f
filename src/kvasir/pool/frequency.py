"""Eviction by number of uses: LFU and the Mooncake paper's LengthAwareCache (arXiv 2407.00079, Table 1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from kvasir.core.keys import BlockKey
from kvasir.pool.eviction import Block
from kvasir.pool.ghosts import Ghosts

Rank = tuple[int, int]


class _Ranked:
    """Idle slots by rank, lowest first, of equal rank the least recently used; O(log r) at r distinct ranks."""

    def __init__(self) -> None:
        self._ranks: dict[int, Rank] = {}
        self._classes: dict[Rank, OrderedDict[int, None]] = {}
        self._heap: list[Rank] = []  # exactly the keys of _classes, which may be empty for a while

    def __len__(self) -> int:
        return len(self._ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ranks)

    def put(self, slot: int, rank: Rank) -> None:
        self._ranks[slot] = rank
        members = self._classes.get(rank)
        if members is None:
            members = self._classes[rank] = OrderedDict()
            heappush(self._heap, rank)
        members[slot] = None

    def remove(self, slot: int) -> None:
        del self._classes[self._ranks.pop(slot)][slot]

    def pop(self, count: int) -> list[int]:
        heap, classes = self._heap, self._classes
        slots: list[int] = []
        while heap and len(slots) < count:
            if members := classes[heap[0]]:
                slot = members.popitem(last=False)[0]
                del self._ranks[slot]
                slots.append(slot)
            else:
                del classes[heappop(heap)]
        return slots


class Lfu:
    """Least frequently used goes first, of those the least recently used. A block that comes back is credited with the uses
    that its ghost remembers. Along a sequence uses only grow towards the start, so suffixes go first.
    """

    def __init__(self) -> None:
        self._ranked = _Ranked()
        self._known: dict[int, tuple[BlockKey, int]] = {}  # slot → its block, and the uses of its earlier stays
        self._total: dict[int, int] = {}
        self._ghosts: Ghosts[int] = Ghosts()

    def add(self, slots: Sequence[int], blocks: Sequence[Block], now: float) -> None:
        for slot, block in zip(slots, blocks, strict=True):
            known = self._known.get(slot)
            if known is None or known[0] != block.key:
                known = self._known[slot] = (block.key, self._ghosts.recall(block.key) or 0)
            total = self._total[slot] = known[1] + block.uses
            self._ranked.put(slot, (total, 0))

    def remove(self, slots: Sequence[int], blocks: Sequence[Block], now: float) -> None:
        for slot in slots:
            self._ranked.remove(slot)

    def forget(self, slot: int, block: Block, now: float) -> None:
        self._ranked.remove(slot)
        del self._known[slot], self._total[slot]

    def victims(self, count: int, now: float) -> list[int]:
        slots = self._ranked.pop(count)
        gone = [(self._known.pop(slot)[0], self._total.pop(slot)) for slot in slots]
        self._ghosts.leave(gone, len(self._known))
        return slots

    def __len__(self) -> int:
        return len(self._ranked)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ranked)


class LengthAware:
    """As LFU, but of equal use the block that lies deeper in its sequence goes first. Without memory, as in the paper."""

    def __init__(self) -> None:
        self._ranked = _Ranked()

    def add(self, slots: Sequence[int], blocks: Sequence[Block], now: float) -> None:
        for slot, block in zip(slots, blocks, strict=True):
            self._ranked.put(slot, (block.uses, -block.depth))

    def remove(self, slots: Sequence[int], blocks: Sequence[Block], now: float) -> None:
        for slot in slots:
            self._ranked.remove(slot)

    def forget(self, slot: int, block: Block, now: float) -> None:
        self._ranked.remove(slot)

    def victims(self, count: int, now: float) -> list[int]:
        return self._ranked.pop(count)

    def __len__(self) -> int:
        return len(self._ranked)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ranked)
