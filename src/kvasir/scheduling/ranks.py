"""In which order prompts get their turn on an instance: a number per request, fixed when it is placed; the least goes first."""

from __future__ import annotations

from collections.abc import Callable

Rank = Callable[[float, float, float], float]
"""(now, when the first token is due, predicted seconds of the whole prefill) → place in the queue; ties go by arrival."""

AGEING = 4.0
"""Seconds of waiting that outweigh one second of prefill. At 1 the order is nearly first come, at infinity starvation."""


def first_come(now: float, due_s: float, prefill_s: float) -> float:
    return now


def deadline_first(now: float, due_s: float, prefill_s: float) -> float:
    """Earliest deadline first: meets all deadlines whenever any order does, prefill being preemptible (Liu, Layland 1973)."""
    return due_s


def shortest_first(now: float, due_s: float, prefill_s: float) -> float:
    """Shortest first with ageing. Ageing needs no reordering: all age alike, so only arrival and size count."""
    return now + AGEING * prefill_s


RANKS: dict[str, Rank] = {"first-come": first_come, "deadline-first": deadline_first, "shortest-first": shortest_first}
"""Name on the command line → order."""
