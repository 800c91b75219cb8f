"""The shortest queue in predicted seconds, blind to caches (the paper's load balancing baseline)."""

from __future__ import annotations

from random import Random

from kvasir.scheduling.policies.best import best_of
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.view import ClusterView


class LeastLoaded:
    name = "least-loaded"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        return best_of(view.prefills.wait_s, view.local, "shortest wait")
