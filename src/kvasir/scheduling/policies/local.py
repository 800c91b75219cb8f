"""Cache-aware without transfers: least predicted TTFT, counting only what is already on the instance's node."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from kvasir.scheduling.policies.best import best_of, best_of_few
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.view import ClusterView

if TYPE_CHECKING:
    from kvasir.scheduling.few import FewView


class Local:
    name = "local"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        return best_of(view.prefills.wait_s + view.own_s, view.own, "least TTFT from local caches")

    def place_few(self, view: FewView) -> Choice | None:
        """As `place`."""
        ttft_s = [known.wait_s + known.local_s for known in view.prefillers]
        return best_of_few(view, ttft_s, view.local, "least TTFT from local caches")
