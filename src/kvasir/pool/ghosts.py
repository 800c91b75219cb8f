"""What an eviction policy remembers of blocks that went, for a bounded time: until as many others have gone."""

from __future__ import annotations

from itertools import islice
from typing import Generic, TypeVar

from kvasir.core.keys import BlockKey

T = TypeVar("T")

MIN_GHOSTS = 1024
FORGOTTEN_AT_ONCE = 8
"""When there are too many, one in so many is forgotten. To look for the oldest alone would take longer the more have gone:
a dict keeps the places of those that went before."""

GHOSTS_PER_BLOCK = 4
"""A ghost costs some 200 bytes, a block hundreds of kilobytes; a cache several times larger is as far as memory helps."""


class Ghosts(Generic[T]):
    """The last blocks that were evicted, oldest forgotten first, so a suffix is forgotten before its prefix."""

    def __init__(self) -> None:
        self._past: dict[BlockKey, T] = {}
        self._limit = MIN_GHOSTS

    def __len__(self) -> int:
        return len(self._past)

    def leave(self, key: BlockKey, past: T) -> None:
        """A block was evicted, after those that left before; it was recalled when it came."""
        self._past[key] = past

    def trim(self, num_blocks: int) -> None:
        """Beside so many blocks that stay, some may have to be forgotten."""
        ghosts = self._past
        limit = GHOSTS_PER_BLOCK * num_blocks
        if limit > self._limit:
            self._limit = limit
        while len(ghosts) > self._limit:
            for oldest in list(islice(ghosts, max(1, self._limit // FORGOTTEN_AT_ONCE))):
                del ghosts[oldest]

    def recall(self, key: BlockKey) -> T | None:
        """What was left behind under the key, if anything; it is forgotten with this."""
        past = self._past.get(key)
        if past is not None:
            del self._past[key]
        return past
