"""Any instance, evenly: the baseline that everything must beat."""

from __future__ import annotations

from random import Random

from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.view import ClusterView


class RandomChoice:
    name = "random"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        return Choice((view.local(rng.randrange(len(view.prefills))),), f"chance among {len(view.prefills)}")
