"""Virtual time: what will happen, in order of time and, at one time, in the order in which it was planned."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from operator import attrgetter
from typing import Any, Final

from mypy_extensions import mypyc_attr

Call = Callable[[Any], None]

NEVER_S: Final = math.inf
_time: Final = attrgetter("time_s")


@mypyc_attr(acyclic=True)
class Planned:
    """What will happen at `time_s`, which the agenda sets. A subclass says what; what happens most has one of its own."""

    __slots__ = ("time_s",)

    def __init__(self) -> None:
        self.time_s = 0.0

    def happen(self) -> None:
        raise NotImplementedError


@mypyc_attr(acyclic=True)
class _Called(Planned):
    __slots__ = ("argument", "call")

    def __init__(self, call: Call, argument: Any):
        super().__init__()
        self.call = call
        self.argument = argument

    def happen(self) -> None:
        self.call(self.argument)


class Agenda:
    """Calls in order. `now` is the time of the call that runs; nothing can be planned for the past.

    What comes in the present span of time, the `_span`th, is a list kept in order, the next thing at its end. What comes
    later lies by span, as it was planned, and is put in order when that begins: of thousands of things, planned each for
    another instance, an insertion looks at a few, and those it has looked at before. `span_s` should have some dozens of them.
    """

    __slots__ = ("_is_stopped", "_later", "_planned", "_span", "_span_s", "_spans", "now")

    def __init__(self, span_s: float = 1.0) -> None:
        self._span_s = span_s
        self._span = 0
        self._planned: list[Planned] = []
        self._later: dict[int, list[Planned]] = {}
        self._spans: list[int] = []  # of `_later`, a heap
        self._is_stopped = False
        self.now = 0.0

    def __len__(self) -> int:
        return len(self._planned) + sum(map(len, self._later.values()))

    def at(self, time_s: float, call: Call, argument: Any = None) -> None:
        """Call `call(argument)` at `time_s`. What is planned cannot be taken back: the callee must know that it is void."""
        self.plan(time_s, _Called(call, argument))

    def plan(self, time_s: float, what: Planned) -> None:
        """As `at`; what is planned for `NEVER_S` does not happen."""
        if time_s < self.now:
            time_s = self.now
        elif time_s == NEVER_S:
            return
        what.time_s = time_s
        span = int(time_s / self._span_s)
        if span > self._span:
            later = self._later.get(span)
            if later is None:
                self._later[span] = [what]
                heappush(self._spans, span)
            else:
                later.append(what)
            return
        planned = self._planned
        low, high = 0, len(planned)
        while low < high:
            middle = (low + high) >> 1
            if planned[middle].time_s > time_s:
                low = middle + 1
            else:
                high = middle
        planned.insert(low, what)

    def soon(self, call: Call, argument: Any = None) -> None:
        """At the present time, after all that is planned for it already."""
        self.at(self.now, call, argument)

    def step(self) -> None:
        """Let the next thing happen."""
        if not self._planned and self._spans:
            self._begin_span()
        planned = self._planned.pop()
        self.now = planned.time_s
        planned.happen()

    def _begin_span(self) -> None:
        self._span = span = heappop(self._spans)
        planned = self._later.pop(span)
        planned.reverse()
        planned.sort(key=_time, reverse=True)  # of one time, what was planned last stays first
        self._planned = planned

    def run(self) -> None:
        """Let things happen, one after the other, until somebody says `stop` (or nothing is planned: IndexError)."""
        self._is_stopped = False
        while not self._is_stopped:
            self.step()

    def stop(self) -> None:
        """What happens now is the last."""
        self._is_stopped = True

    def forget(self) -> None:
        """Nothing that is planned will happen: let go of it, and of whom it refers to."""
        self._planned, self._later, self._spans = [], {}, []
