"""The cores that all instances of one node compute on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvasir.simulator.agenda import Agenda

DONE_S = 1e-9
"""Work that is nearly done is done: what is left of it is rounding."""


@dataclass(slots=True)
class _Work:
    """`left_s` of an undisturbed step are to be done; then `then(argument)` is called."""

    left_s: float
    is_low: bool
    then: Callable[[Any], None]
    argument: Any


class Cores:
    """Steps at normal priority share the cores evenly; those at low priority share what is left.

    While any step runs at normal priority, that is `low_share` of the cores: its threads wait for each other and for
    memory now and then. Both use the caches and the memory, so that beside a step at low priority others are at `normal_share`
    of their undisturbed speed.
    """

    def __init__(self, agenda: Agenda, low_share: float, normal_share: float = 1.0):
        self._agenda = agenda
        self._low_share = low_share
        self._normal_share = normal_share
        self._works: dict[str, _Work] = {}
        self._as_of_s = 0.0
        self._number = 0  # of the plan; an earlier one is void

    def run(self, name: str, seconds: float, *, is_low: bool, then: Callable[[Any], None], argument: Any) -> None:
        """Compute a step that takes `seconds` undisturbed, for an instance that computes nothing else."""
        self._advance()
        self._works[name] = _Work(seconds, is_low, then, argument)
        self._plan()

    def stop(self, name: str) -> None:
        """Its process died."""
        self._advance()
        self._works.pop(name, None)
        self._plan()

    def _speed(self, work: _Work) -> float:
        num_low = sum(other.is_low for other in self._works.values())
        num_normal = len(self._works) - num_low
        if work.is_low:
            return (self._low_share if num_normal else 1.0) / num_low
        return (self._normal_share if num_low else 1.0) / num_normal

    def _advance(self) -> None:
        elapsed_s, self._as_of_s = self._agenda.now - self._as_of_s, self._agenda.now
        speeds = [(work, self._speed(work)) for work in self._works.values()]
        for work, speed in speeds:
            work.left_s -= elapsed_s * speed

    def _plan(self) -> None:
        self._number += 1
        speeds = [(work.left_s, self._speed(work)) for work in self._works.values()]
        ends_s = min((left_s / speed for left_s, speed in speeds if speed > 0), default=None)
        if ends_s is not None:
            self._agenda.at(self._agenda.now + ends_s, self._end, self._number)

    def _end(self, number: int) -> None:
        if number != self._number:
            return
        self._advance()
        done = [name for name, work in self._works.items() if work.left_s <= DONE_S]
        works = [self._works.pop(name) for name in done]
        self._plan()
        for work in works:
            work.then(work.argument)
