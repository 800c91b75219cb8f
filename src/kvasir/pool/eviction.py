"""Which block goes when space is needed: the interface, and least recently used, the default."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol


class Eviction(Protocol):
    """The published blocks that nobody leases, and the order in which they may go.

    A policy sees a block each time it becomes idle, so it can count uses by itself; what it knows of a slot ends when the
    slot is given out as victim. Blocks of one sequence become idle deepest first, and a policy must keep that order among
    equals: a suffix is worth nothing without its prefix.
    """

    def add(self, slot: int, depth: int, now: float) -> None:
        """The block in `slot`, number `depth` of its sequence, was released by its last reader (or first published)."""
        ...

    def remove(self, slot: int) -> None:
        """The block is leased again."""
        ...

    def victim(self, now: float) -> int | None:
        """Take out the block that goes first; None when there is none."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...


class Lru:
    """Least recently used goes first; every operation takes constant time."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def add(self, slot: int, depth: int, now: float) -> None:
        self._order[slot] = None

    def remove(self, slot: int) -> None:
        del self._order[slot]

    def victim(self, now: float) -> int | None:
        return self._order.popitem(last=False)[0] if self._order else None

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)
