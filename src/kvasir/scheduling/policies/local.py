"""Cache-aware without transfers: least predicted TTFT, counting only what is already on the instance's node."""

from __future__ import annotations

from random import Random

from kvasir.scheduling.policies.interface import Choice, best_of
from kvasir.scheduling.view import ClusterView


class Local:
    name = "local"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        return best_of(view.prefills.wait_s + view.own_s, view.own, "least TTFT from local caches")
