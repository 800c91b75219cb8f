"""The choice of the least score, which most policies end in."""

from __future__ import annotations

from collections.abc import Callable

from kvasir.core.commands import Candidate
from kvasir.scheduling.policies.choice import NUM_RECORDED, Choice
from kvasir.scheduling.view import Floats


def best_of(scores: Floats, candidate: Callable[[int], Candidate], why: str) -> Choice:
    """The row with the least score, and the next best for the record; the first of equals is the lowest id."""
    rows = scores.argsort(kind="stable")[:NUM_RECORDED]
    return Choice(tuple([candidate(row) for row in rows.tolist()]), f"{why} among {len(scores)}")


def best_of_few(scores: list[float], candidate: Callable[[int], Candidate], why: str) -> Choice:
    """As `best_of`."""
    rows = _least(scores, min(NUM_RECORDED, len(scores)))
    return Choice(tuple([candidate(row) for row in rows]), f"{why} among {len(scores)}")


def _least(scores: list[float], count: int) -> list[int]:
    """The rows of the least scores, in order; of equals the first goes first."""
    rows: list[int] = []
    for row, score in enumerate(scores):
        if len(rows) == count:
            if score >= scores[rows[-1]]:
                continue
            rows.pop()
        place = len(rows)
        while place and score < scores[rows[place - 1]]:
            place -= 1
        rows.insert(place, row)
    return rows
