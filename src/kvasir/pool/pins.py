"""What was asked to stay: blocks that are pinned for a time, and blocks that go earlier or later than others.

Whoever pins names a sequence from its first block on, so a block's pin lasts no longer than those of all blocks before it, and
its priority is no higher: an evictor that honours both never makes a hole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import Priority
from kvasir.pool.eviction import Block


@dataclass(slots=True)
class Mark:
    """Of one block; `children` are the marked ones that follow on it, and its `parent` is marked too.

    A low priority holds until somebody else uses the block: as long as it has `uses`, and no sequence goes deeper than `last`.
    """

    parent: BlockKey | None
    priority: Priority
    until_s: float = 0.0
    is_pinned: bool = False
    children: set[BlockKey] = field(default_factory=set)
    uses: int = 0
    last: int = 0


class Pins:
    """The marks by key, and how many of them are pins; at most `max_pinned`."""

    def __init__(self, max_pinned: int):
        self.max_pinned = max_pinned
        self.num_pinned = 0
        self._marks: dict[BlockKey, Mark] = {}
        self._expiries: list[tuple[float, int, BlockKey]] = []  # a heap; of equal time the deepest first

    def __bool__(self) -> bool:
        """Whether anything is marked."""
        return bool(self._marks)

    def is_pinned(self, key: BlockKey) -> bool:
        mark = self._marks.get(key)
        return mark is not None and mark.is_pinned

    def priority(self, block: Block) -> Priority:
        mark = self._marks.get(block.key)
        if mark is None:
            return Priority.NORMAL
        if mark.priority is Priority.LOW and (block.uses != mark.uses or block.deepest > mark.last):
            return Priority.NORMAL
        return mark.priority

    def has_room(self, blocks: Sequence[Block]) -> bool:
        """Whether all of these may be pinned."""
        return self.num_pinned + sum(not self.is_pinned(block.key) for block in blocks) <= self.max_pinned

    def mark(self, blocks: Sequence[Block], until_s: float, priority: Priority, now: float) -> None:
        """The first blocks of a sequence; what was said of them before is only ever raised."""
        unshared = _first_unshared(blocks) if priority is Priority.LOW else 0
        parent: BlockKey | None = None
        for i, block in enumerate(blocks):
            asked = priority if i >= unshared else Priority.NORMAL
            mark = self._marks.get(block.key)
            if mark is None:
                mark = self._marks[block.key] = Mark(parent, asked)
                if parent is not None:
                    self._marks[parent].children.add(block.key)
            mark.priority = max(mark.priority, asked)
            mark.uses, mark.last = block.uses, len(blocks) - 1
            if until_s > max(now, mark.until_s):
                mark.until_s = until_s
                self.num_pinned += not mark.is_pinned
                mark.is_pinned = True
                heappush(self._expiries, (until_s, -block.depth, block.key))
            parent = block.key

    def unmark(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """The end of this sequence, as far as no longer one that is marked goes through it; which, deepest first."""
        gone = []
        for key in reversed(keys):
            mark = self._marks.get(key)
            if mark is None:
                continue
            if mark.children:
                break
            gone += self.gone(key)
        return gone

    def expire(self, now: float) -> list[BlockKey]:
        """Those that are pinned no longer, deepest first."""
        over = []
        while self._expiries and self._expiries[0][0] <= now:
            until_s, _, key = heappop(self._expiries)
            mark = self._marks.get(key)
            if mark is not None and mark.is_pinned and mark.until_s <= until_s:
                mark.is_pinned = False
                self.num_pinned -= 1
                over.append(key)
        return over

    def gone(self, key: BlockKey) -> list[BlockKey]:
        """The block has left the tier: its mark goes, and those of all that followed on it; which, deepest first."""
        if key not in self._marks:
            return []
        keys = [key]
        for found in keys:
            keys += sorted(self._marks[found].children)
        for found in reversed(keys):
            mark = self._marks.pop(found)
            self.num_pinned -= mark.is_pinned
            if mark.parent is not None:
                self._marks[mark.parent].children.discard(found)
        if len(self._expiries) > 2 * len(self._marks) + 64:  # mostly of marks that are gone
            self._expiries = sorted(e for e in self._expiries if (m := self._marks.get(e[2])) is not None and m.until_s == e[0])
        return keys[::-1]

    def problems(self, published: dict[BlockKey, Block]) -> Iterator[str]:
        """Each broken invariant, in words."""
        if stray := self._marks.keys() - published.keys():
            yield f"{len(stray)} blocks are marked to stay and are not there"
        for key, mark in self._marks.items():
            if mark.parent is not None and key not in self._marks[mark.parent].children:
                yield f"block {key.hex()} is marked, and not known to the one before it"
            if any(self._marks[child].until_s > mark.until_s for child in mark.children):
                yield f"block {key.hex()} is pinned for less time than one after it"
        num_pinned = sum(mark.is_pinned for mark in self._marks.values())
        if num_pinned != self.num_pinned or num_pinned > self.max_pinned:
            yield f"{num_pinned} blocks are pinned, counted are {self.num_pinned}, allowed {self.max_pinned}"


def _first_unshared(blocks: Sequence[Block]) -> int:
    """From where on to the end nobody else went through these blocks, as far as can be told."""
    last = len(blocks) - 1
    first = len(blocks)
    while first and blocks[first - 1].uses == blocks[last].uses and blocks[first - 1].deepest <= last:
        first -= 1
    return first
