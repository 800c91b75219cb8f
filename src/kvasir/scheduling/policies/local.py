"""Cache-aware without transfers: least predicted TTFT, counting only what is already on the instance's node."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from kvasir.scheduling.policies.best import best_of, best_of_few
from kvasir.scheduling.policies.interface import Choice
from kvasir.scheduling.view import ClusterView

if TYPE_CHECKING:
    from kvasir.scheduling.few import FewView


class Local:
    name = "local"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        return best_of(view.prefills.wait_s + view.own_s, view.own, "least TTFT from local caches")

    def place_few(self, view: FewView) -> Choice | None:
        """As `place`."""
        local_s = [view.prefill_s(prefix) / pace for prefix, pace in zip(view.prefix_tokens, view.pace, strict=True)]
        ttft_s = [wait_s + seconds for wait_s, seconds in zip(view.wait_s, local_s, strict=True)]
        return best_of_few(ttft_s, view.local, "least TTFT from local caches")
