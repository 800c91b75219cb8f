"""The slots of one arena: which are free, which hold a published block under which key, and how many leases pin it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvasir.core.keys import BlockKey
from kvasir.pool.eviction import Eviction


@dataclass(frozen=True, slots=True)
class Taken:
    """Slots that were free or made free, and the keys of the blocks that had to go for it."""

    slots: tuple[int, ...]
    evicted: tuple[BlockKey, ...]


class SlotTable:
    """Slots that are neither free nor published are held by others: reserved or private, which is the node's to know."""

    def __init__(self, num_slots: int, eviction: Eviction):
        self.num_slots = num_slots
        self.index: dict[BlockKey, int] = {}
        self.free = list(range(num_slots - 1, -1, -1))  # a stack: low slots first, and the warmest again
        self.pins = [0] * num_slots
        self._keys: list[BlockKey | None] = [None] * num_slots
        self._depths = [0] * num_slots
        self._idle = eviction

    @property
    def num_pinned(self) -> int:
        return len(self.index) - len(self._idle)

    def take(self, count: int, now: float) -> Taken:
        """Up to `count` slots; blocks that nobody leases are evicted as needed."""
        evicted = self._evict(count - len(self.free), now)
        slots = tuple(self.free.pop() for _ in range(min(count, len(self.free))))
        return Taken(slots, tuple(evicted))

    def give_back(self, slots: Iterable[int]) -> None:
        """These become free."""
        self.free.extend(slots)

    def publish(self, key: BlockKey, slot: int, depth: int) -> int:
        """Publish a held slot as block `depth` of its sequence unless the key is published; pins and returns its slot."""
        first = self.index.setdefault(key, slot)
        if first == slot:
            self._keys[slot], self._depths[slot] = key, depth
            self.pins[slot] = 1
        else:
            self._pin(first)
        return first

    def pin_prefix(self, keys: Iterable[BlockKey]) -> list[int]:
        """Pin the longest published prefix of `keys`; its slots in order."""
        slots = []
        index, pins, idle = self.index, self.pins, self._idle
        for key in keys:
            slot = index.get(key)
            if slot is None:
                break
            if not pins[slot]:
                idle.remove(slot)
            pins[slot] += 1
            slots.append(slot)
        return slots

    def unpin(self, slots: Sequence[int], now: float) -> None:
        """Unpin the blocks of one sequence, given in order of depth; the deepest become idle first."""
        pins, depths, add = self.pins, self._depths, self._idle.add
        for slot in reversed(slots):
            pins[slot] -= 1
            if not pins[slot]:
                add(slot, depths[slot], now)

    def problems(self) -> Iterator[str]:
        """Each broken invariant, in words."""
        published = {slot: key for slot, key in enumerate(self._keys) if key is not None}
        if published != {slot: key for key, slot in self.index.items()}:
            yield f"index and keys disagree: {len(self.index)} keys for {len(published)} published slots"
        pinned = {slot for slot, pins in enumerate(self.pins) if pins}
        if stray := pinned - published.keys():
            yield f"pinned but not published: slots {sorted(stray)}"
        idle = list(self._idle)
        if len(idle) != len(self._idle) or sorted(idle) != sorted(published.keys() - pinned):
            yield f"eviction order holds {sorted(idle)}, published and not pinned are {sorted(published.keys() - pinned)}"

    def _pin(self, slot: int) -> None:
        if not self.pins[slot]:
            self._idle.remove(slot)
        self.pins[slot] += 1

    def _evict(self, count: int, now: float) -> list[BlockKey]:
        evicted: list[BlockKey] = []
        while len(evicted) < count and (slot := self._idle.victim(now)) is not None:
            key = self._keys[slot]
            assert key is not None, "only published blocks are in the eviction order"
            del self.index[key]
            self._keys[slot] = None
            self.free.append(slot)
            evicted.append(key)
        return evicted
