"""Token gaps without tokens: an instance logs runs of equal decode passes, and a sequence's gaps are a slice of that log.

    passes   |  step of 1  |       step of 40 passes        |  step of 7  | ...
    log      | (1, 0.21 s) |         (40, 0.031 s)          | (7, 0.03 s) |
    a join        last token ─ extra ─▶├── slice of the log ──────────▶ its end

Every decoding sequence is in every step of its instance, except while pages are short.
"""

from __future__ import annotations

from array import array
from operator import itemgetter
from typing import Final

TAIL_PER_CENT: Final = 10
"""TBT of a request is the mean of its longest tenth of gaps: report/timeline.py has the definition for single tokens."""

Runs = list[tuple[float, int]]
"""Seconds, and how many gaps of that length there were."""

_SECONDS = itemgetter(0)


class GapLog:
    """What the decode passes of one instance took; `passes` counts all so far, the last of which ended at `ended_s`."""

    __slots__ = ("_counts", "_seconds", "ended_s", "passes")

    def __init__(self) -> None:
        self._counts = array("q")
        self._seconds = array("d")
        self.passes = 0
        self.ended_s = 0.0

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, passes: int, pass_s: float, *, idle_s: float, now: float) -> None:
        """`passes` of `pass_s` each ended now, after `idle_s` in which sequences that were here before got no token."""
        self.passes += passes
        self.ended_s = now
        if idle_s > 0:
            self._put(1, idle_s + pass_s)
            passes -= 1
        if passes:
            self._put(passes, pass_s)

    def since(self, start: int, extra_s: float) -> Runs:
        """The gaps from entry `start` on; the first of them is `extra_s` longer for whoever joined then."""
        runs = list(zip(self._seconds[start:], self._counts[start:], strict=True))
        if runs and extra_s:
            seconds, count = runs[0]
            runs[0] = seconds, count - 1
            runs.append((seconds + extra_s, 1))
        return runs

    def _put(self, count: int, seconds: float) -> None:
        self._counts.append(count)
        self._seconds.append(seconds)


def single(seconds: float) -> Runs:
    """One gap."""
    return [(seconds, 1)]


def tbt_s(gaps: Runs) -> float | None:
    """Mean of the longest 10 % of the gaps, at least one; None without a gap."""
    num_gaps = sum([count for _, count in gaps])
    if not num_gaps:
        return None
    num_longest = left = -(-num_gaps * TAIL_PER_CENT // 100)
    total_s = 0.0
    for seconds, count in sorted(gaps, key=_SECONDS, reverse=True):
        if count >= left:
            return (total_s + left * seconds) / num_longest
        total_s += count * seconds
        left -= count
    raise AssertionError("the longest are some of all")
