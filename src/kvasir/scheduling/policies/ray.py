"""Ray Serve LLM's prefix cache affinity router: to the cache while loads are about even, else to the better of two."""

from __future__ import annotations

from random import Random

import numpy as np

from kvasir.scheduling.policies.best import best_of
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.policies.load import in_flight
from kvasir.scheduling.view import ClusterView

IMBALANCED_THRESHOLD = 10
MATCH_RATE_THRESHOLD = 0.1
"""Ray's defaults, in requests and as a share of the prompt."""


class Ray:
    """If `max - min > 10` requests or no match has 10 % of the prompt, the less loaded of two drawn by lot (power of two
    choices); else the longest match.

    Adapted: matches are exact, where Ray guesses them by a tree of the texts that it sent.
    """

    name = "ray"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        load = in_flight(view.prefills)
        match = view.prefills.prefix_tokens / view.num_prompt_tokens
        if np.ptp(load) <= IMBALANCED_THRESHOLD and match.max() >= MATCH_RATE_THRESHOLD:
            return best_of(-match, view.local, "longest match")
        drawn = sorted(rng.sample(range(len(load)), min(2, len(load))))
        row = min(drawn, key=lambda row: int(load[row]))
        return Choice((view.local(row),), f"less load of two drawn among {len(load)}")
