"""Virtual time: what will happen, in order of time and, at one time, in the order in which it was planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

Call = Callable[[Any], None]

MOST: Final = 512
"""What a part of an agenda holds: to insert into one moves half of it, to look for one takes a few steps each."""


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
    """Calls in order. `now` is the time of the call that runs; nothing can be planned for the past.

    What is planned is a list kept in order, the next thing at its end: a few dozen for a few instances. Of a thousand
    instances it would be thousands, which an insertion moves: then it is cut, and what comes later lies in `_later`, in parts
    of at most `most`, each in order, the next part at the end.
    """

    __slots__ = ("_is_stopped", "_later", "_most", "_planned", "now")

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._planned: list[Planned] = []
        self._later: list[list[Planned]] = []
        self._is_stopped = False
        self.now = 0.0

    def __len__(self) -> int:
        return len(self._planned) + sum(map(len, self._later))

    def at(self, time_s: float, call: Call, argument: Any = None) -> None:
        """Call `call(argument)` at `time_s`. What is planned cannot be taken back: the callee must know that it is void."""
        self.plan(time_s, _Called(call, argument))

    def plan(self, time_s: float, what: Planned) -> None:
        """As `at`."""
        if time_s < self.now:
            time_s = self.now
        what.time_s = time_s
        later = self._later
        part = len(later)
        while part and later[part - 1][-1].time_s <= time_s:
            part -= 1
        planned = later[part] if part < len(later) else self._planned
        low, high = 0, len(planned)
        while low < high:
            middle = (low + high) >> 1
            if planned[middle].time_s > time_s:
                low = middle + 1
            else:
                high = middle
        planned.insert(low, what)
        if len(planned) > self._most:
            later.insert(part, planned[: self._most // 2])
            del planned[: self._most // 2]

    def soon(self, call: Call, argument: Any = None) -> None:
        """At the present time, after all that is planned for it already."""
        self.at(self.now, call, argument)

    def step(self) -> None:
        """Let the next thing happen."""
        if not self._planned and self._later:
            self._planned = self._later.pop()
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
