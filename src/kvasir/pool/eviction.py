"""Which block goes when space is needed: the interface, and least recently used, the default."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from kvasir.core.keys import BlockKey


@dataclass(slots=True)
class Block:
    """What is known of a block in a tier. `depth` is its number in its sequence, `deepest` that of the deepest block of any
    sequence that went through it, `uses` how many leases have had it since it came into the tier.

    Whoever uses a block uses all blocks before it and lets go of them no earlier. So along a sequence, from its end to its
    start, `uses`, `deepest` and the time of the last release never decrease.
    """

    key: BlockKey
    depth: int
    deepest: int
    uses: int = 0


class Eviction(Protocol):
    """The published blocks that nobody leases, and the order in which they may go.

    A suffix is worth nothing without its prefix, so it must go first. Blocks of one sequence are added deepest first, and
    what `Block` says of them never decreases towards the start: a policy that orders by what grows with those, and by
    the order of adding among equals, keeps the rule without knowing the tree. A policy may read a block while it has it.
    """

    def add(self, slot: int, block: Block, now: float) -> None:
        """The block in `slot` was released by its last reader (or first published)."""
        ...

    def remove(self, slot: int, now: float) -> None:
        """The block is leased again."""
        ...

    def forget(self, slot: int, now: float) -> None:
        """The block is gone, for no reason of this policy: it was dropped or its copy is lost."""
        ...

    def victim(self, now: float) -> int | None:
        """Take out the block that goes first; None when there is none."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...


class Lru:
    """Least recently used goes first; every operation takes constant time. Suffixes go first because they are added first."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def add(self, slot: int, block: Block, now: float) -> None:
        self._order[slot] = None

    def remove(self, slot: int, now: float) -> None:
        del self._order[slot]

    def forget(self, slot: int, now: float) -> None:
        del self._order[slot]

    def victim(self, now: float) -> int | None:
        return self._order.popitem(last=False)[0] if self._order else None

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)
