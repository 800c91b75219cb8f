"""What a node was told last, events or their like, for the story of a broken invariant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

STORY_LENGTH: Final = 64


class Story:
    """Iterates over (time in seconds, event), the oldest first, at most `length`. A ring, for one is told with every event."""

    __slots__ = ("_events", "_length", "_num_told", "_times_s")

    def __init__(self, length: int) -> None:
        self._length = length
        self._num_told = 0
        self._times_s: list[float] = []
        self._events: list[object] = []

    def tell(self, now: float, event: object) -> None:
        if not self._length:
            return
        place = self._num_told % self._length
        self._num_told += 1
        if place == len(self._events):
            self._times_s.append(now)
            self._events.append(event)
        else:
            self._times_s[place], self._events[place] = now, event

    def __iter__(self) -> Iterator[tuple[float, object]]:
        told = list(zip(self._times_s, self._events, strict=True))
        oldest = self._num_told % self._length if len(told) == self._length else 0
        return iter(told[oldest:] + told[:oldest])
