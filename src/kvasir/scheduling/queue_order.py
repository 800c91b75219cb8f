"""In which order waiting sequences get their turn: a number per sequence, fixed when it is submitted; the least goes first."""

from __future__ import annotations

from collections.abc import Callable

from kvasir.core.events import Submitted

QueueOrder = Callable[[Submitted, float], float]
"""(sequence, now) → its place within its priority class; ties go by submission."""


def first_come(event: Submitted, now: float) -> float:
    return now


def aged_shortest_first(seconds_per_token: float) -> QueueOrder:
    """Shortest remaining prompt first; each second of waiting is worth `1 / seconds_per_token` tokens.

    Ageing needs no reordering: who waits ages like everybody else, so only arrival time and size count.
    """

    def order(event: Submitted, now: float) -> float:
        return now + seconds_per_token * (event.num_tokens - event.num_computed)

    return order
