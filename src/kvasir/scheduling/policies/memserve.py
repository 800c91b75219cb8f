"""MemServe's global scheduler (arXiv 2406.17565): least cost from the own prompt tree, then fetch if that pays."""

from __future__ import annotations

from random import Random

import numpy as np

from kvasir.core.commands import Candidate
from kvasir.scheduling.policies.best import best_of
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.view import ClusterView


class MemServe:
    """`argmin_p sum of exec over p's queue + exec(x, y_p)`, y_p the share of prompt x that p holds.

    The chosen p fetches from the p' that holds most iff `transfer(y_p, y_p') <= exec(x, y_p) - exec(x, y_p')`, with the whole
    transfer, also where layers would hide some of it. Fetching is not weighed in the choice of p, which Mooncake does.
    Adapted: exec is this cluster's cost model instead of theirs per operator; prompt trees are exact and have no TTL.
    """

    name = "memserve"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        return best_of(view.prefills.wait_s + view.own_s, lambda row: _plan(view, row), "least cost from own prompt tree")


def _plan(view: ClusterView, row: int) -> Candidate:
    if not np.isfinite(view.fetch_s[row]):
        return view.own(row)
    transfer_s = view.transfer_s(view.best_tokens - view.prefills.prefix.at(row))
    saved_s = view.own_s[row] - view.prefill_s(view.best_tokens) / view.prefills.pace[row]
    return view.fetch(row) if transfer_s <= saved_s else view.own(row)
