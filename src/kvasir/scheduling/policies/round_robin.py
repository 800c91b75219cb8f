"""Each instance in turn, by id."""

from __future__ import annotations

from random import Random

from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.view import ClusterView


class RoundRobin:
    """Remembers the last instance by id, so that instances may come and go."""

    name = "round-robin"

    def __init__(self) -> None:
        self._last = ""

    def place(self, view: ClusterView, rng: Random) -> Choice:
        ids = view.prefills.ids
        row = next((row for row, name in enumerate(ids) if name > self._last), 0)
        self._last = ids[row]
        return Choice((view.local(row),), f"turn among {len(ids)}")
