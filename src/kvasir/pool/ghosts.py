"""What an eviction policy remembers of blocks that went, for a bounded time: until as many others have gone."""

from __future__ import annotations

from typing import Generic, TypeVar

from kvasir.core.keys import BlockKey

T = TypeVar("T")

MIN_GHOSTS = 1024
GHOSTS_PER_BLOCK = 4
"""A ghost costs some 200 bytes, a block hundreds of kilobytes; a cache several times larger is as far as memory helps."""


class Ghosts(Generic[T]):
    """The last blocks that were evicted, oldest forgotten first, so a suffix is forgotten before its prefix."""

    def __init__(self) -> None:
        self._past: dict[BlockKey, T] = {}
        self._limit = MIN_GHOSTS

    def __len__(self) -> int:
        return len(self._past)

    def leave(self, key: BlockKey, past: T, num_blocks: int) -> None:
        """A block was evicted, beside which `num_blocks` stay."""
        self._past.pop(key, None)
        self._past[key] = past
        self._limit = max(self._limit, GHOSTS_PER_BLOCK * num_blocks)
        if len(self._past) > self._limit:
            del self._past[next(iter(self._past))]

    def recall(self, key: BlockKey) -> T | None:
        """What was left behind under the key, if anything; it is forgotten with this."""
        return self._past.pop(key, None)
