"""The slots of one arena: which are free, which hold a published block under which key, and how many leases pin it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from kvasir.core.keys import BlockKey
from kvasir.pool.eviction import Block, Eviction

T = TypeVar("T", bound=Eviction)


class SlotTable:
    """Slots that are neither free nor published are held by others: reserved, private, loading or spilling: the node's to know.

    A block whose slot is in `writing` is being copied out of it: it may be evicted, but its slot is not free before `written`;
    until then it is in `gone`, too.
    """

    def __init__(self, num_slots: int, eviction: Eviction):
        self.num_slots = num_slots
        self.index: dict[BlockKey, Block] = {}
        self.free = list(range(num_slots - 1, -1, -1))  # a stack: low slots first, and the warmest again
        self.writing: set[int] = set()
        self.gone: set[int] = set()
        self._idle = eviction

    @property
    def num_pinned(self) -> int:
        return len(self.index) - len(self._idle)

    def take(self, count: int, now: float) -> tuple[tuple[int, ...], list[Block]]:
        """Up to `count` slots, and the blocks that had to go for it, in that order: those that nobody leases."""
        evicted = self._evict(count, now) if count > len(self.free) else []
        free = self.free
        left = max(0, len(free) - count)
        slots = free[left:]
        slots.reverse()
        del free[left:]
        return tuple(slots), evicted

    def give_back(self, slots: Iterable[int]) -> None:
        """These become free."""
        self.free.extend(slots)

    def written(self, slot: int) -> None:
        """The slot is no longer read by whoever copied it out."""
        self.writing.remove(slot)
        if slot in self.gone:
            self.gone.remove(slot)
            self.free.append(slot)

    def publish(self, key: BlockKey, slot: int, depth: int, now: float) -> Block:
        """Publish a held slot as block `depth` of its sequence, or find the one that is published under the key; pins it."""
        block = self.index.get(key)
        if block is not None:
            self._pin([block], now)
            return block
        block = self.index[key] = Block(key, slot, depth, depth, uses=1, pins=1)
        return block

    def publish_new(self, keys: tuple[BlockKey, ...], slots: tuple[int, ...], depth: int) -> list[Block]:
        """As `publish`, of blocks from `depth` on, if none of the keys is published and none named twice; else nothing."""
        index = self.index
        blocks: list[Block] = []
        for place, key in enumerate(keys):
            block = Block(key, slots[place], depth, depth, uses=1, pins=1)
            if index.setdefault(key, block) is not block:
                for published in blocks:
                    del index[published.key]
                return []
            blocks.append(block)
            depth += 1
        return blocks

    def pin_prefix(self, keys: Sequence[BlockKey], now: float) -> list[Block]:
        """Pin the longest published prefix of `keys`; its blocks in order."""
        index = self.index
        blocks: list[Block] = []
        for key in keys:
            block = index.get(key)
            if block is None:
                break
            blocks.append(block)
        self._pin(blocks, now)
        return blocks

    def unpin(self, blocks: list[Block], now: float) -> None:
        """Unpin the blocks of one sequence, given in order of depth; the deepest become idle first."""
        deepest = len(blocks) - 1
        idle: list[Block] = []
        for block in reversed(blocks):
            if block.deepest < deepest:
                block.deepest = deepest
            block.pins -= 1
            if not block.pins:
                idle.append(block)
        if idle:
            self._idle.add(idle, now)

    def forget(self, keys: Iterable[BlockKey], now: float) -> list[BlockKey]:
        """Free the slots of those of `keys` that are published and not pinned; which they were."""
        gone = []
        for key in keys:
            block = self.index.get(key)
            if block is None or block.pins:
                continue
            self._idle.forget(block, now)
            self.unpublish(block)
            gone.append(key)
        return gone

    def unpublish(self, block: Block) -> None:
        """Free the slot of a block that nobody leases and that has left the eviction order."""
        del self.index[block.key]
        if self.writing and block.slot in self.writing:
            self.gone.add(block.slot)
        else:
            self.free.append(block.slot)

    def reorder(self, order: Callable[[SlotTable, Eviction], T]) -> T:
        """Put another order around the present one."""
        self._idle = idle = order(self, self._idle)
        return idle

    def is_pinned(self, key: BlockKey) -> bool:
        """Whether the block is published and leased."""
        block = self.index.get(key)
        return block is not None and block.pins > 0

    def problems(self) -> Iterator[str]:
        """Each broken invariant, in words."""
        if any(block.key != key for key, block in self.index.items()):
            yield "the index has blocks under keys that are not theirs"
        if not self.gone <= self.writing:
            yield f"slots {sorted(self.gone - self.writing)} are kept for writes that nobody makes"
        idle = list(self._idle)
        unpinned = [block for block in self.index.values() if not block.pins]
        if len(idle) != len(self._idle) or len(idle) != len(unpinned) or set(idle) != set(unpinned):
            slots = sorted(block.slot for block in idle), sorted(block.slot for block in unpinned)
            yield f"eviction order holds {slots[0]}, published and not pinned are {slots[1]}"

    def _pin(self, blocks: list[Block], now: float) -> None:
        idle: list[Block] = []
        for block in blocks:
            block.uses += 1
            if not block.pins:
                idle.append(block)
            block.pins += 1
        if idle:
            self._idle.remove(idle, now)

    def _evict(self, count: int, now: float) -> list[Block]:
        evicted: list[Block] = []
        while (missing := count - len(self.free)) > 0 and (victims := self._idle.victims(missing, now)):
            for block in victims:
                self.unpublish(block)
            evicted += victims
        return evicted
