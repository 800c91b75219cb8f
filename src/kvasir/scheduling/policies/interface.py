"""What every prefill placement policy is: one method from a view of the cluster to a choice."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.view import ClusterView

if TYPE_CHECKING:
    from kvasir.scheduling.few import FewView


class Placement(Protocol):
    """Picks the prefill instance, and what of the prefix is brought there. Equal scores go to the lower instance id.

    `name` is its row in the table, for configuration, decisions and metrics.
    """

    @property
    def name(self) -> str: ...

    def place(self, view: ClusterView, rng: Random) -> Choice:
        """`view.prefills` is not empty. Draw only from `rng`."""
        ...


@runtime_checkable
class PlacementOfFew(Protocol):
    """A policy of least TTFT that also places number by number."""

    def fetches(self, prefix_tokens: int, best_tokens: int) -> bool:
        """Whether it may bring the longest prefix to where there is one of `prefix_tokens`, if that is faster."""
        ...

    def place_few(self, view: FewView) -> Choice | None:
        """What `place` would choose, or None to be asked that after all."""
        ...
