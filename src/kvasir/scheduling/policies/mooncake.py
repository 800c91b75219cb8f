"""Algorithm 1 of the Mooncake paper (FAST'25, section 4.2): cache-aware, with hot prefixes fetched and so replicated."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

import numpy as np

from kvasir.scheduling.policies.best import best_of, best_of_few
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.view import ClusterView

if TYPE_CHECKING:
    from kvasir.scheduling.few import FewView

BALANCING_THRESHOLD: Final = 4.0
"""Fetch when the best prefix is more than this many times the own. The paper tunes it by hand and gives no value; at 4 a
fetch saves at least three quarters of the prefix, and prefixes are copied where it pays, not everywhere."""

WHY: Final = "least TTFT by Algorithm 1"


class Mooncake:
    """For each instance: the longest prefix of any node if `best / own > threshold`, else its own; then least TTFT.

    Two traps of the printed algorithm are settled here. An own prefix of 0 counts as an infinite ratio. And the text says
    to fetch if recomputing is *shorter* than the transfer, which must be the other way round: a fetch is a plan only
    where transfer plus the shorter prefill are predicted faster than the prefill from the own prefix.
    """

    name = "mooncake"

    def __init__(self, balancing_threshold: float = BALANCING_THRESHOLD):
        self.balancing_threshold = balancing_threshold

    def place(self, view: ClusterView, rng: Random) -> Choice:
        is_short = view.best_tokens > self.balancing_threshold * view.prefills.prefix_tokens
        fetches = is_short & (view.fetch_s < view.own_s)
        ttft_s = view.prefills.wait_s + np.where(fetches, view.fetch_s, view.own_s)
        return best_of(ttft_s, lambda row: view.fetch(row) if fetches[row] else view.own(row), WHY)

    def place_few(self, view: FewView) -> Choice | None:
        """As `place`."""
        return best_of_few(view, WHY)

    def fetches(self, prefix_tokens: int, best_tokens: int) -> bool:
        return best_tokens > self.balancing_threshold * prefix_tokens
