"""How questions ask: generators that yield the runs they want and are sent everything known so far.

Questions that are asked together share their runs, and a round's new runs go to `Evaluate` at once, so that it can do them in
parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeAlias, TypeVar

from msgspec import Struct

from kvasir.simulator.planner.runs import Figures, RunSpec

T = TypeVar("T")
Known: TypeAlias = Mapping[RunSpec, Figures]
Asking: TypeAlias = Generator[list[RunSpec], Known, T]
"""Yields wanted runs; is sent what is known, with these among it; returns what it was asked."""

Evaluate: TypeAlias = Callable[[Sequence[RunSpec]], Sequence[Figures]]
"""Figures of each run, in order."""


def answered(asking: Asking[T], evaluate: Evaluate, known: dict[RunSpec, Figures]) -> T:
    """Evaluate what is asked and not known yet, until there is an answer. `known` grows."""
    try:
        wanted = next(asking)
        while True:
            missing = [run for run in dict.fromkeys(wanted) if run not in known]
            if missing:
                known.update(zip(missing, evaluate(missing), strict=True))
            wanted = asking.send(known)
    except StopIteration as end:
        answer: T = end.value
        return answer


def together(*askings: Asking[T]) -> Asking[list[T]]:
    """All of them side by side: one round asks for what each of them wants next."""
    answers: dict[int, T] = {}
    waiting: dict[int, list[RunSpec]] = {number: [] for number in range(len(askings))}
    known: Known = {}
    started = False
    while waiting:
        for number in list(waiting):
            try:
                wanted = askings[number].send(known) if started else next(askings[number])
                while all(run in known for run in wanted):
                    wanted = askings[number].send(known)
                waiting[number] = wanted
            except StopIteration as end:
                answers[number] = end.value
                del waiting[number]
        started = True
        if waiting:
            known = yield [run for wanted in waiting.values() for run in wanted]
    return [answers[number] for number in range(len(askings))]


class Search(Struct, frozen=True):
    """The number found, and the runs made on the way, the smallest number first."""

    number: int | None
    runs: tuple[RunSpec, ...]


def smallest_passing(run_at: Callable[[int], RunSpec], *, start: int, lowest: int, highest: int) -> Asking[Search]:
    """The smallest number in [lowest, highest] whose run passes, supposing that all above it do too; None if none does.

    From `start` by steps that double until both sides are seen, then by halving what is between.
    """
    low, high = lowest - 1, highest + 1  # the largest that fails and the smallest that passes, so far
    number, step = min(max(start, lowest), highest), 1
    tried: dict[int, RunSpec] = {}
    while low + 1 < high:
        run = tried[number] = run_at(number)
        if (yield [run])[run].passes:
            high = number
        else:
            low = number
        if low < lowest:
            number, step = max(high - step, lowest), step * 2
        elif high > highest:
            number, step = min(low + step, highest), step * 2
        else:
            number = (low + high) // 2
    return Search(high if high <= highest else None, tuple(tried[n] for n in sorted(tried)))
