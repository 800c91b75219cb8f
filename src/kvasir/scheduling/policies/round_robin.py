"""Each instance in turn, by id."""

from __future__ import annotations

from random import Random

from kvasir.scheduling.policies.interface import Choice
from kvasir.scheduling.view import ClusterView


class RoundRobin:
    """Remembers the last instance by id, so that instances may come and go."""

    name = "round-robin"

    def __init__(self) -> None:
        self._last = ""

    def place(self, view: ClusterView, rng: Random) -> Choice:
        instance = next((p for p in view.prefills if p.id > self._last), view.prefills[0])
        self._last = instance.id
        chosen = view.local(instance)
        return Choice(chosen, (chosen,), f"turn among {len(view.prefills)}")
