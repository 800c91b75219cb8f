"""Which block goes when space is needed: the interface, and least recently used, the default."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from kvasir.core.keys import BlockKey

if TYPE_CHECKING:
    from kvasir.pool.runs import Run


class Block:
    """A block in a `slot` of a tier. `depth` is its number in its sequence, `deepest` that of the deepest block of any
    sequence that went through it, `uses` how many leases have had it since it came into the tier, `pins` how many have it now.

    Whoever uses a block uses all blocks before it and lets go of them no earlier. So along a sequence, from its end to its
    start, `uses`, `deepest` and the time of the last release never decrease.

    What follows is the eviction policy's own, which notes it here instead of in a table beside: whether it knows the block
    (it was idle before), its uses in earlier stays, whether it is watched, and with which others it is idle now.
    """

    __slots__ = ("deepest", "depth", "is_known", "is_watched", "key", "past_uses", "pins", "run", "slot", "uses")

    def __init__(self, key: BlockKey, slot: int, depth: int, deepest: int, *, uses: int = 0, pins: int = 0):
        self.key = key
        self.slot = slot
        self.depth = depth
        self.deepest = deepest
        self.uses = uses
        self.pins = pins
        self.is_known = False
        self.past_uses = 0
        self.is_watched = False
        self.run: Run | None = None


class Eviction(Protocol):
    """The published blocks that nobody leases, and the order in which they may go.

    A suffix is worth nothing without its prefix, so it must go first. Blocks of one sequence are added deepest first, and
    what `Block` says of them never decreases towards the start: a policy that orders by what grows with those, and by
    the order of adding among equals, keeps the rule without knowing the tree. A policy may read a block while it has it.

    Everything is told of many blocks at a time, because a call for each took longer than what it did.
    """

    def add(self, blocks: list[Block], now: float) -> None:
        """These blocks were released by their last reader (or first published), in this order."""
        ...

    def remove(self, blocks: list[Block], now: float) -> None:
        """These blocks are leased again."""
        ...

    def forget(self, block: Block, now: float) -> None:
        """The block is gone, for no reason of this policy: it was dropped or its copy is lost."""
        ...

    def victims(self, count: int, now: float) -> list[Block]:
        """Take out the blocks that go first, at most `count`, in that order; none when there are none."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Block]: ...


class Lru:
    """Least recently used goes first; every operation takes constant time. Suffixes go first because they are added first."""

    def __init__(self) -> None:
        self._order: OrderedDict[Block, None] = OrderedDict()

    def add(self, blocks: list[Block], now: float) -> None:
        self._order.update(dict.fromkeys(blocks))

    def remove(self, blocks: list[Block], now: float) -> None:
        order = self._order
        for block in blocks:
            del order[block]

    def forget(self, block: Block, now: float) -> None:
        del self._order[block]

    def victims(self, count: int, now: float) -> list[Block]:
        pop = self._order.popitem
        return [pop(last=False)[0] for _ in range(min(count, len(self._order)))]

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._order)
