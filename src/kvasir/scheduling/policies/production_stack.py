"""vLLM production-stack's load-aware rule: share of the prompt cached, less the load above the mean."""

from __future__ import annotations

from random import Random

from kvasir.scheduling.policies.best import best_of
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.policies.load import in_flight
from kvasir.scheduling.view import ClusterView

BETA = 1.0
"""Its default weight of the load."""


class ProductionStack:
    """`cached / prompt - beta * (load - mean) / max(1, mean)`, the highest wins (production-stack #1035)."""

    name = "production-stack"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        load = in_flight(view.prefills)
        mean = load.mean()
        scores = view.prefills.prefix_tokens / view.num_prompt_tokens - BETA * (load - mean) / max(1.0, mean)
        return best_of(-scores, view.local, "highest score of match and load")
