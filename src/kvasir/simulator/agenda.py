"""Virtual time: what will happen, in order of time and, at one time, in the order in which it was planned."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Call = Callable[[Any], None]


class _Planned:
    """`call(argument)` at `time_s`; of what happens at one time, the least `number` goes first."""

    __slots__ = ("argument", "call", "number", "time_s")

    def __init__(self, time_s: float, number: int, call: Call, argument: Any):
        self.time_s = time_s
        self.number = number
        self.call = call
        self.argument = argument

    def __lt__(self, other: _Planned) -> bool:
        return self.time_s < other.time_s or (self.time_s == other.time_s and self.number < other.number)


class Agenda:
    """A heap of calls. `now` is the time of the call that runs; nothing can be planned for the past."""

    __slots__ = ("_heap", "_is_stopped", "_number", "now")

    def __init__(self) -> None:
        self._heap: list[_Planned] = []
        self._number = 0
        self._is_stopped = False
        self.now = 0.0

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, time_s: float, call: Call, argument: Any = None) -> None:
        """Call `call(argument)` at `time_s`. What is planned cannot be taken back: the callee must know that it is void."""
        self._number += 1
        if time_s < self.now:
            time_s = self.now
        heappush(self._heap, _Planned(time_s, self._number, call, argument))

    def soon(self, call: Call, argument: Any = None) -> None:
        """At the present time, after all that is planned for it already."""
        self.at(self.now, call, argument)

    def step(self) -> None:
        """Let the next thing happen."""
        planned = heappop(self._heap)
        self.now = planned.time_s
        planned.call(planned.argument)

    def run(self) -> None:
        """Let things happen, one after the other, until somebody says `stop` (or nothing is planned: IndexError)."""
        self._is_stopped = False
        while not self._is_stopped:
            self.step()

    def stop(self) -> None:
        """What happens now is the last."""
        self._is_stopped = True
