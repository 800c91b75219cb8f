"""The slots of one arena: which are free, which hold a published block under which key, and how many leases pin it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

from kvasir.core.keys import BlockKey
from kvasir.pool.eviction import Block, Eviction

T = TypeVar("T", bound=Eviction)


CHUNK: Final = 512
"""Keys that are looked up at a time: few enough to waste little behind the end of a prefix."""


class SlotTable:
    """Slots that are neither free nor published are held by others: reserved, private, loading or spilling: the node's to know.

    A block whose slot is in `writing` is being copied out of it: it may be evicted, but its slot is not free before `written`.
    """

    def __init__(self, num_slots: int, eviction: Eviction):
        self.num_slots = num_slots
        self.index: dict[BlockKey, int] = {}
        self.free = list(range(num_slots - 1, -1, -1))  # a stack: low slots first, and the warmest again
        self.pins = [0] * num_slots
        self.writing: set[int] = set()
        self._blocks: list[Block | None] = [None] * num_slots
        self._idle = eviction

    @property
    def num_pinned(self) -> int:
        return len(self.index) - len(self._idle)

    @property
    def gone(self) -> frozenset[int]:
        """Slots whose block was evicted while it is written out."""
        return frozenset(slot for slot in self.writing if self._blocks[slot] is None)

    def block(self, slot: int) -> Block:
        """The block that is published in the slot."""
        block = self._blocks[slot]
        assert block is not None, "only published slots are asked for"
        return block

    def take(self, count: int, now: float) -> tuple[tuple[int, ...], list[Block]]:
        """Up to `count` slots, and the blocks that had to go for it, in that order: those that nobody leases."""
        evicted = self._evict(count, now) if count > len(self.free) else []
        free = self.free
        left = max(0, len(free) - count)
        slots = tuple(reversed(free[left:]))
        del free[left:]
        return slots, evicted

    def give_back(self, slots: Iterable[int]) -> None:
        """These become free."""
        self.free.extend(slots)

    def written(self, slot: int) -> None:
        """The slot is no longer read by whoever copied it out."""
        self.writing.remove(slot)
        if self._blocks[slot] is None:
            self.free.append(slot)

    def publish(self, key: BlockKey, slot: int, depth: int, now: float) -> int:
        """Publish a held slot as block `depth` of its sequence unless the key is published; pins and returns its slot."""
        first = self.index.setdefault(key, slot)
        if first == slot:
            self._blocks[slot] = Block(key, depth, depth, 1)
            self.pins[slot] = 1
        else:
            self._pin([first], now)
        return first

    def publish_new(self, keys: Sequence[BlockKey], slots: Sequence[int], depth: int) -> bool:
        """As `publish`, of blocks from `depth` on, if none of the keys is published and none named twice; else nothing."""
        index, blocks, pins = self.index, self._blocks, self.pins
        if not index.keys().isdisjoint(keys) or len(set(keys)) < len(keys):
            return False
        index.update(zip(keys, slots, strict=True))
        for place, slot in enumerate(slots):
            blocks[slot] = Block(keys[place], depth, depth, 1)
            pins[slot] = 1
            depth += 1
        return True

    def pin_prefix(self, keys: Sequence[BlockKey], now: float) -> list[int]:
        """Pin the longest published prefix of `keys`; its slots in order."""
        slots: list[int] = []
        get = self.index.get
        for start in range(0, len(keys), CHUNK):
            found = list(map(get, keys[start : start + CHUNK]))
            if None in found:
                slots += found[: found.index(None)]  # type: ignore[arg-type]  # all before the first None
                break
            slots += found  # type: ignore[arg-type]
        self._pin(slots, now)
        return slots

    def unpin(self, slots: Sequence[int], now: float) -> None:
        """Unpin the blocks of one sequence, given in order of depth; the deepest become idle first."""
        pins, table = self.pins, self._blocks
        deepest = len(slots) - 1
        idle: list[int] = []
        blocks: list[Block] = []
        for slot in reversed(slots):
            block = table[slot]
            assert block is not None, "a pinned block is published"
            if block.deepest < deepest:
                block.deepest = deepest
            pins[slot] = left = pins[slot] - 1
            if not left:
                idle.append(slot)
                blocks.append(block)
        if idle:
            self._idle.add(idle, blocks, now)

    def forget(self, keys: Iterable[BlockKey], now: float) -> list[BlockKey]:
        """Free the slots of those of `keys` that are published and not pinned; which they were."""
        gone = []
        for key in keys:
            slot = self.index.get(key)
            if slot is None or self.pins[slot]:
                continue
            self._idle.forget(slot, self.block(slot), now)
            self.unpublish(slot)
            gone.append(key)
        return gone

    def unpublish(self, slot: int) -> Block:
        """Free the slot of a block that nobody leases and that has left the eviction order."""
        block = self.block(slot)
        del self.index[block.key]
        self._blocks[slot] = None
        if slot not in self.writing:
            self.free.append(slot)
        return block

    def reorder(self, order: Callable[[SlotTable, Eviction], T]) -> T:
        """Put another order around the present one."""
        self._idle = idle = order(self, self._idle)
        return idle

    def is_pinned(self, key: BlockKey) -> bool:
        """Whether the block is published and leased."""
        slot = self.index.get(key)
        return slot is not None and self.pins[slot] > 0

    def problems(self) -> Iterator[str]:
        """Each broken invariant, in words."""
        published = {slot: block.key for slot, block in enumerate(self._blocks) if block is not None}
        if published != {slot: key for key, slot in self.index.items()}:
            yield f"index and keys disagree: {len(self.index)} keys for {len(published)} published slots"
        pinned = {slot for slot, pins in enumerate(self.pins) if pins}
        if stray := pinned - published.keys():
            yield f"pinned but not published: slots {sorted(stray)}"
        idle = list(self._idle)
        if len(idle) != len(self._idle) or sorted(idle) != sorted(published.keys() - pinned):
            yield f"eviction order holds {sorted(idle)}, published and not pinned are {sorted(published.keys() - pinned)}"

    def _pin(self, slots: Sequence[int], now: float) -> None:
        pins, table = self.pins, self._blocks
        idle: list[int] = []
        blocks: list[Block] = []
        for slot in slots:
            block = table[slot]
            assert block is not None, "only published blocks are pinned"
            block.uses += 1
            if not pins[slot]:
                idle.append(slot)
                blocks.append(block)
            pins[slot] += 1
        if idle:
            self._idle.remove(idle, blocks, now)

    def _evict(self, count: int, now: float) -> list[Block]:
        evicted: list[Block] = []
        blocks, index, free, writing = self._blocks, self.index, self.free, self.writing
        while (missing := count - len(free)) > 0 and (victims := self._idle.victims(missing, now)):
            for slot in victims:
                block = blocks[slot]
                assert block is not None, "only published blocks are in the eviction order"
                del index[block.key]
                blocks[slot] = None
                evicted.append(block)
            free += [slot for slot in victims if slot not in writing] if writing else victims
        return evicted
