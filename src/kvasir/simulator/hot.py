"""Which blocks were hit most."""

from __future__ import annotations

from collections.abc import Sequence

from kvasir.core.keys import BlockKey


class HotBlocks:
    """The `count` blocks hit most so far. Counts only grow, so who is hit less than the last of the top is not in the next."""

    __slots__ = ("_contenders", "_count", "_hits", "_least")

    def __init__(self, count: int):
        self._count = count
        self._hits: dict[BlockKey, int] = {}
        self._contenders: dict[BlockKey, None] = {}  # the last top, and what has had as many hits since
        self._least = 0

    def hit(self, keys: Sequence[BlockKey]) -> None:
        if not self._count:
            return
        hits, contenders, least = self._hits, self._contenders, self._least
        for key in keys:
            num_hits = hits.get(key, 0) + 1
            hits[key] = num_hits
            if num_hits >= least:
                contenders[key] = None

    def top(self) -> list[BlockKey]:
        """The most hit first; ties by key."""
        hits = self._hits
        top = sorted(self._contenders, key=lambda key: (-hits[key], key))[: self._count]
        if len(top) == self._count:
            self._least = hits[top[-1]] if top else 0
            self._contenders = dict.fromkeys(top)
        return top
