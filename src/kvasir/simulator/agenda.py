"""Virtual time: what will happen, in order of time and, at one time, in the order in which it was planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Call = Callable[[Any], None]


class Planned:
    """What will happen at `time_s`, which the agenda sets. A subclass says what; what happens most has one of its own."""

    __slots__ = ("time_s",)

    def __init__(self) -> None:
        self.time_s = 0.0

    def happen(self) -> None:
        raise NotImplementedError


class _Called(Planned):
    __slots__ = ("argument", "call")

    def __init__(self, call: Call, argument: Any):
        super().__init__()
        self.call = call
        self.argument = argument

    def happen(self) -> None:
        self.call(self.argument)


class Agenda:
    """Calls in order. `now` is the time of the call that runs; nothing can be planned for the past."""

    __slots__ = ("_is_stopped", "_planned", "now")

    def __init__(self) -> None:
        self._planned: list[Planned] = []  # what happens next is at the end: few enough to be kept in order
        self._is_stopped = False
        self.now = 0.0

    def __len__(self) -> int:
        return len(self._planned)

    def at(self, time_s: float, call: Call, argument: Any = None) -> None:
        """Call `call(argument)` at `time_s`. What is planned cannot be taken back: the callee must know that it is void."""
        self.plan(time_s, _Called(call, argument))

    def plan(self, time_s: float, what: Planned) -> None:
        """As `at`."""
        if time_s < self.now:
            time_s = self.now
        what.time_s = time_s
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
        planned = self._planned.pop()
        self.now = planned.time_s
        planned.happen()

    def run(self) -> None:
        """Let things happen, one after the other, until somebody says `stop` (or nothing is planned: IndexError)."""
        self._is_stopped = False
        while not self._is_stopped:
            self.step()

    def stop(self) -> None:
        """What happens now is the last."""
        self._is_stopped = True
