"""Cache-aware without transfers: least predicted TTFT, counting only what is already on the instance's node."""

from __future__ import annotations

from random import Random

from kvasir.scheduling.policies.interface import Choice, least_ttft
from kvasir.scheduling.view import ClusterView


class Local:
    name = "local"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        return least_ttft(map(view.local, view.prefills), f"least TTFT from local caches among {len(view.prefills)}")
