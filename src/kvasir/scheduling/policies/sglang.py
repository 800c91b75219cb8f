"""SGLang's gateway, policy cache_aware: to the cache while loads are about even, to the least loaded when not."""

from __future__ import annotations

from random import Random

from kvasir.scheduling.policies.best import best_of
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.policies.load import in_flight
from kvasir.scheduling.view import ClusterView

CACHE_THRESHOLD = 0.3
BALANCE_ABS_THRESHOLD = 64
BALANCE_REL_THRESHOLD = 1.5
"""Defaults of the command line and its documentation; the library's own are 0.5, 32 and 1.1."""


class Sglang:
    """If `max - min > 64 and max > 1.5 * min` requests, the least loaded; else the longest match if it is above 0.3 of the
    prompt; else the least loaded.

    Adapted: matches are exact, where the gateway guesses them by a tree of the texts that it sent; below the threshold some
    versions take the smallest tree instead of the least load.
    """

    name = "sglang"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        load = in_flight(view.prefills)
        most, least = int(load.max()), int(load.min())
        if most - least > BALANCE_ABS_THRESHOLD and most > BALANCE_REL_THRESHOLD * least:
            return best_of(load.astype(float), view.local, "least load, loads being uneven,")
        match = view.prefills.prefix_tokens / view.num_prompt_tokens
        if match.max() > CACHE_THRESHOLD:
            return best_of(-match, view.local, "longest match")
        return best_of(load.astype(float), view.local, "least load, matches being short,")
