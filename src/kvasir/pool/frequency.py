"""Eviction by number of uses: LFU and the Mooncake paper's LengthAwareCache (arXiv 2407.00079, Table 1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heappop, heappush

from kvasir.pool.eviction import Block
from kvasir.pool.ghosts import Ghosts

Rank = tuple[int, int]


class _Ranked:
    """Idle blocks by rank, lowest first, of equal rank the least recently used; O(log r) at r distinct ranks."""

    def __init__(self) -> None:
        self._ranks: dict[Block, Rank] = {}
        self._classes: dict[Rank, OrderedDict[Block, None]] = {}
        self._heap: list[Rank] = []  # exactly the keys of _classes, which may be empty for a while

    def __len__(self) -> int:
        return len(self._ranks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._ranks)

    def put(self, block: Block, rank: Rank) -> None:
        self._ranks[block] = rank
        members = self._classes.get(rank)
        if members is None:
            members = self._classes[rank] = OrderedDict()
            heappush(self._heap, rank)
        members[block] = None

    def remove(self, block: Block) -> None:
        del self._classes[self._ranks.pop(block)][block]

    def pop(self, count: int) -> list[Block]:
        heap, classes = self._heap, self._classes
        blocks: list[Block] = []
        while heap and len(blocks) < count:
            if members := classes[heap[0]]:
                block = members.popitem(last=False)[0]
                del self._ranks[block]
                blocks.append(block)
            else:
                del classes[heappop(heap)]
        return blocks


class Lfu:
    """Least frequently used goes first, of those the least recently used. A block that comes back is credited with the uses
    that its ghost remembers. Along a sequence uses only grow towards the start, so suffixes go first.
    """

    def __init__(self) -> None:
        self._ranked = _Ranked()
        self._num_known = 0
        self._ghosts: Ghosts[int] = Ghosts()

    def add(self, blocks: list[Block], now: float) -> None:
        for block in blocks:
            if not block.is_known:
                block.is_known, block.past_uses = True, self._ghosts.recall(block.key) or 0
                self._num_known += 1
            self._ranked.put(block, (block.past_uses + block.uses, 0))

    def remove(self, blocks: list[Block], now: float) -> None:
        for block in blocks:
            self._ranked.remove(block)

    def forget(self, block: Block, now: float) -> None:
        self._ranked.remove(block)
        block.is_known = False
        self._num_known -= 1

    def victims(self, count: int, now: float) -> list[Block]:
        blocks = self._ranked.pop(count)
        self._num_known -= len(blocks)
        for block in blocks:
            self._ghosts.leave(block.key, block.past_uses + block.uses)
        self._ghosts.trim(self._num_known)
        return blocks

    def __len__(self) -> int:
        return len(self._ranked)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._ranked)


class LengthAware:
    """As LFU, but of equal use the block that lies deeper in its sequence goes first. Without memory, as in the paper."""

    def __init__(self) -> None:
        self._ranked = _Ranked()

    def add(self, blocks: list[Block], now: float) -> None:
        for block in blocks:
            self._ranked.put(block, (block.uses, -block.depth))

    def remove(self, blocks: list[Block], now: float) -> None:
        for block in blocks:
            self._ranked.remove(block)

    def forget(self, block: Block, now: float) -> None:
        self._ranked.remove(block)

    def victims(self, count: int, now: float) -> list[Block]:
        return self._ranked.pop(count)

    def __len__(self) -> int:
        return len(self._ranked)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._ranked)
