"""Which block goes when space is needed: the interface, and least recently used, the default."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

from kvasir.core.keys import BlockKey


class Block:
    """What is known of a block in a tier. `depth` is its number in its sequence, `deepest` that of the deepest block of any
    sequence that went through it, `uses` how many leases have had it since it came into the tier.

    Whoever uses a block uses all blocks before it and lets go of them no earlier. So along a sequence, from its end to its
    start, `uses`, `deepest` and the time of the last release never decrease.

    What follows is the eviction policy's own, which notes it here instead of in a table beside: the `class_` in which the
    block is idle (None: it has never been), with which others (`run`), its uses in earlier stays, and whether it is watched.
    """

    __slots__ = ("class_", "deepest", "depth", "is_watched", "key", "past_uses", "run", "uses")

    def __init__(self, key: BlockKey, depth: int, deepest: int, uses: int = 0):
        self.key = key
        self.depth = depth
        self.deepest = deepest
        self.uses = uses
        self.class_: int | None = None
        self.run = 0
        self.past_uses = 0
        self.is_watched = False


class Eviction(Protocol):
    """The published blocks that nobody leases, and the order in which they may go.

    A suffix is worth nothing without its prefix, so it must go first. Blocks of one sequence are added deepest first, and
    what `Block` says of them never decreases towards the start: a policy that orders by what grows with those, and by
    the order of adding among equals, keeps the rule without knowing the tree. A policy may read a block while it has it.

    Everything is told of many blocks at a time, because a call for each took longer than what it did.
    """

    def add(self, slots: Sequence[int], blocks: Sequence[Block], now: float) -> None:
        """The blocks in these slots were released by their last reader (or first published), in this order."""
        ...

    def remove(self, slots: Sequence[int], blocks: Sequence[Block], now: float) -> None:
        """These blocks are leased again."""
        ...

    def forget(self, slot: int, block: Block, now: float) -> None:
        """The block is gone, for no reason of this policy: it was dropped or its copy is lost."""
        ...

    def victims(self, count: int, now: float) -> list[int]:
        """Take out the blocks that go first, at most `count`, in that order; none when there are none."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...


class Lru:
    """Least recently used goes first; every operation takes constant time. Suffixes go first because they are added first."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def add(self, slots: Sequence[int], blocks: Sequence[Block], now: float) -> None:
        self._order.update(dict.fromkeys(slots))

    def remove(self, slots: Sequence[int], blocks: Sequence[Block], now: float) -> None:
        order = self._order
        for slot in slots:
            del order[slot]

    def forget(self, slot: int, block: Block, now: float) -> None:
        del self._order[slot]

    def victims(self, count: int, now: float) -> list[int]:
        pop = self._order.popitem
        return [pop(last=False)[0] for _ in range(min(count, len(self._order)))]

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)
