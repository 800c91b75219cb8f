"""How likely an idle block is to be used again in the next second, learnt from what has happened to others."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from kvasir.core.keys import BlockKey

MAX_CLASS: Final = 4
"""Uses are told apart as 1, 2 to 3, 4 to 7, 8 and more: their bit length, at most this. Nobody has used class 0."""

AGES: Final = 22
TICKS_PER_SECOND: Final = 8
"""Ages are told apart by octaves from 1/8 s on; the last one begins at 36 hours."""

SAMPLE: Final = 4
"""One block in so many is watched, by its key, so that it is the same one after it was evicted."""

MAX_WATCHED: Final = 32_768
"""Watched blocks; those of 131,000 blocks, here or gone."""

REFIT_EVERY: Final = 4096
"""Uses of watched blocks and newly watched ones after which the rates are computed anew, in some milliseconds at most."""

KEEP: Final = 0.9
"""Share of its weight that the past keeps at each refit: it counts for some 40,000 releases of watched blocks."""

PRIOR_BLOCKS: Final = 8.0
PRIOR_REUSE: Final = 0.25
"""Before anything was seen, as if of so many blocks this share had been reused in each octave of age: LRU's assumption."""

_START = [0.0] + [2.0**i / TICKS_PER_SECOND for i in range(AGES)]
_WIDTH = [end - start for start, end in pairwise(_START)]
_CLASSES = range(1, MAX_CLASS + 1)


class ReuseRates:
    """Of the blocks whose key's first byte is a multiple of SAMPLE; `released` and `used` are for those only.

    Life tables, one for each class of uses: of the blocks that were idle for that long, how many were used in that octave.

    A block is watched whether it stays or is evicted, so what the policy does has no influence on what it sees. Rates
    never increase with age nor decrease with uses; where the tables say otherwise, neighbours are put together.
    """

    def __init__(self) -> None:
        self._used = [[0.0] * AGES for _ in range(MAX_CLASS + 1)]
        self._given_up = [[0.0] * AGES for _ in range(MAX_CLASS + 1)]
        self._watched: dict[BlockKey, tuple[int, float]] = {}  # class of uses and time of release, oldest first
        self._rates: list[list[float]] = []
        self._since_refit = 0
        self._refit(0.0)

    def rate(self, uses_class: int, age_s: float) -> float:
        """Chance a second that a block of this class and age is used."""
        return self._rates[uses_class][min(int(age_s * TICKS_PER_SECOND).bit_length(), AGES - 1)]  # _octave, called most of all

    def released(self, key: BlockKey, uses_class: int, now: float) -> None:
        """A block that is watched became idle after so many uses."""
        watched = self._watched
        watched[key] = (uses_class, now)
        if len(watched) > MAX_WATCHED:
            oldest = next(iter(watched))
            past_class, released = watched.pop(oldest)
            self._given_up[past_class][_octave(now - released)] += 1.0
        self._count(now)

    def used(self, key: BlockKey, now: float) -> None:
        """A block was asked for again, whether it was still here or not."""
        past = self._watched.get(key)
        if past is None:
            return
        del self._watched[key]
        self._used[past[0]][_octave(now - past[1])] += 1.0

    def _count(self, now: float) -> None:
        self._since_refit += 1
        if self._since_refit >= REFIT_EVERY:
            self._since_refit = 0
            self._refit(now)

    def _refit(self, now: float) -> None:
        waiting = [[0.0] * AGES for _ in range(MAX_CLASS + 1)]
        for class_, released in self._watched.values():
            waiting[class_][_octave(now - released)] += 1.0
        self._rates = [[0.0] * AGES]
        for class_ in _CLASSES:
            used, given_up = self._used[class_], self._given_up[class_]
            unused = list(map(float.__add__, given_up, waiting[class_]))
            table = _life_table(used, unused)
            self._rates.append(list(map(max, table, self._rates[-1])))
            self._used[class_] = [count * KEEP for count in used]
            self._given_up[class_] = [count * KEEP for count in given_up]


def _life_table(used: list[float], unused: list[float]) -> list[float]:
    """Rates by octave, made non-increasing by pooling adjacent violators, each weighted by its seconds at risk."""
    pools: list[tuple[float, float, int]] = []  # uses, seconds at risk, octaves
    at_risk = sum(used, 0.0) + sum(unused, 0.0)
    for again, never, width in zip(used, unused, _WIDTH, strict=True):
        events = again + PRIOR_BLOCKS * PRIOR_REUSE
        seconds = (at_risk - (again + never) / 2 + PRIOR_BLOCKS) * width
        at_risk = max(0.0, at_risk - again - never)
        octaves = 1
        while pools and pools[-1][0] * seconds < events * pools[-1][1]:
            more_events, more_seconds, more = pools.pop()
            events, seconds, octaves = events + more_events, seconds + more_seconds, octaves + more
        pools.append((events, seconds, octaves))
    return [events / seconds for events, seconds, octaves in pools for _ in range(octaves)]


def _octave(age_s: float) -> int:
    return min(int(age_s * TICKS_PER_SECOND).bit_length(), AGES - 1)
