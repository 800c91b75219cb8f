"""Any instance, evenly: the baseline that everything must beat."""

from __future__ import annotations

from random import Random

from kvasir.scheduling.policies.interface import Choice
from kvasir.scheduling.view import ClusterView


class RandomChoice:
    name = "random"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        chosen = view.local(rng.choice(view.prefills))
        return Choice(chosen, (chosen,), f"chance among {len(view.prefills)}")
