"""Token gaps without tokens: an instance logs runs of equal decode passes, and a sequence's gaps are a slice of that log.

    passes   |  step of 1  |       step of 40 passes        |  step of 7  | ...
    log      | (1, 0.21 s) |         (40, 0.031 s)          | (7, 0.03 s) |
    a join        last token ─ extra ─▶├── slice of the log ──────────▶ its end

Every decoding sequence is in every step of its instance, except while pages are short.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

TAIL_PER_CENT: Final = 10
"""TBT of a request is the mean of its longest tenth of gaps: report/timeline.py has the definition for single tokens."""

MANY: Final = 1024
"""Entries of a log beyond which old ones are dropped: a long simulation has millions."""


@mypyc_attr(acyclic=True)
class Gaps:
    """`count` gaps of `seconds` each. Never changed: the sequences that decode together share them."""

    __slots__ = ("count", "seconds")

    def __init__(self, seconds: float, count: int):
        self.seconds = seconds
        self.count = count


class GapLog:
    """What the decode passes of one instance took; `passes` counts all so far, the last of which ended at `ended_s`."""

    __slots__ = ("_num_dropped", "_runs", "ended_s", "passes")

    def __init__(self) -> None:
        self._runs: list[Gaps] = []
        self._num_dropped = 0
        self.passes = 0
        self.ended_s = 0.0

    def __len__(self) -> int:
        """Where the next entry will be."""
        return self._num_dropped + len(self._runs)

    def add(self, passes: int, pass_s: float, *, idle_s: float, now: float) -> None:
        """`passes` of `pass_s` each ended now, after `idle_s` in which sequences that were here before got no token."""
        self.passes += passes
        self.ended_s = now
        if idle_s > 0:
            self._runs.append(Gaps(idle_s + pass_s, 1))
            passes -= 1
        if passes:
            self._runs.append(Gaps(pass_s, passes))

    def since(self, start: int, extra_s: float) -> list[Gaps]:
        """The gaps from entry `start` on; the first of them is `extra_s` longer for whoever joined then."""
        runs = self._runs[start - self._num_dropped :]
        if runs and extra_s:
            first = runs[0]
            runs[0] = Gaps(first.seconds, first.count - 1)
            runs.append(Gaps(first.seconds + extra_s, 1))
        return runs

    @property
    def is_long(self) -> bool:
        """Whether it is worth looking which entries nobody will ask for."""
        return len(self._runs) >= MANY

    def drop_before(self, start: int) -> None:
        """Nobody will ask for entries before `start`."""
        del self._runs[: start - self._num_dropped]
        self._num_dropped = start


def tbt_s(gaps: list[Gaps]) -> float | None:
    """Mean of the longest 10 % of the gaps, at least one; None without a gap."""
    num_gaps = 0
    for run in gaps:
        num_gaps += run.count
    if not num_gaps:
        return None
    num_longest = left = -(-num_gaps * TAIL_PER_CENT // 100)
    total_s = 0.0
    for run in _longest(gaps, num_longest):
        if run.count >= left:
            return (total_s + left * run.seconds) / num_longest
        total_s += run.count * run.seconds
        left -= run.count
    raise AssertionError("the longest are some of all")


def _longest(gaps: list[Gaps], num_longest: int) -> list[Gaps]:
    """The runs that the longest gaps are in, the longest first, of equal length in their order: no others are sorted."""
    longest: list[Gaps] = []
    num_gaps, least_s = 0, 0.0
    for run in gaps:
        seconds = run.seconds
        if num_gaps >= num_longest and seconds <= least_s:
            continue
        place = len(longest)
        while place and longest[place - 1].seconds < seconds:
            place -= 1
        longest.insert(place, run)
        num_gaps += run.count
        last = longest[-1]
        while num_gaps - last.count >= num_longest:
            num_gaps -= last.count
            longest.pop()
            last = longest[-1]
        least_s = last.seconds
    return longest
