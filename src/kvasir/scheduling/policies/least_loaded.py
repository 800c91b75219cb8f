"""The shortest queue in predicted seconds, blind to caches (the paper's load balancing baseline)."""

from __future__ import annotations

from random import Random

from kvasir.scheduling.policies.interface import Choice
from kvasir.scheduling.view import ClusterView


class LeastLoaded:
    name = "least-loaded"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        candidates = tuple(view.local(instance) for instance in view.prefills)
        chosen = min(candidates, key=lambda c: (c.wait_s, c.instance))
        return Choice(chosen, candidates, f"shortest wait among {len(candidates)}")
