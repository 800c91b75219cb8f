"""The choice of the least score, which most policies end in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvasir.core.commands import Candidate
from kvasir.scheduling.policies.choice import NUM_RECORDED, Choice
from kvasir.scheduling.view import Floats

if TYPE_CHECKING:
    from kvasir.scheduling.few import FewView


def best_of(scores: Floats, candidate: Callable[[int], Candidate], why: str) -> Choice:
    """The row with the least score, and the next best for the record; the first of equals is the lowest id."""
    return choice_of(least_rows(scores), candidate, f"{why} among {len(scores)}")


def choice_of(rows: list[int], candidate: Callable[[int], Candidate], why: str) -> Choice:
    return Choice(tuple([candidate(row) for row in rows]), why)


def least_rows(scores: Floats) -> list[int]:
    """The rows to record, in order; of equals the first goes first. To sort a thousand takes ten times as long."""
    count = min(NUM_RECORDED, len(scores))
    left = scores.copy()
    rows: list[int] = []
    while len(rows) < count:
        row = int(left.argmin())
        if left[row] == math.inf:  # among those left it would be found again
            return [int(row) for row in scores.argsort(kind="stable")[:count]]
        left[row] = math.inf
        rows.append(row)
    return rows


def best_of_few(view: FewView, why: str) -> Choice:
    """As `best_of`, of least TTFT."""
    rows = least_of_few([known.ttft_s for known in view.prefillers])
    return choice_of(rows, view.faster, f"{why} among {view.num_prefillers}")


def least_of_few(scores: list[float]) -> list[int]:
    """As `least_rows`."""
    count = min(NUM_RECORDED, len(scores))
    rows: list[int] = []
    most = math.inf  # of those in `rows`
    for row, score in enumerate(scores):
        if len(rows) == count:
            if score >= most:
                continue
            rows.pop()
        place = len(rows)
        while place and score < scores[rows[place - 1]]:
            place -= 1
        rows.insert(place, row)
        most = scores[rows[-1]]
    return rows
