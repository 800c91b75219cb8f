"""Cache-aware without transfers: least predicted TTFT, counting only what is already on the instance's node."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

from kvasir.scheduling.policies.best import best_of, best_of_few
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.view import ClusterView

if TYPE_CHECKING:
    from kvasir.scheduling.few import FewView

WHY: Final = "least TTFT from local caches"


class Local:
    name = "local"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        return best_of(view.prefills.wait_s + view.own_s, view.own, WHY)

    def place_few(self, view: FewView) -> Choice | None:
        """As `place`."""
        return best_of_few(view, WHY)

    def fetches(self, prefix_tokens: int, best_tokens: int) -> bool:
        return False
