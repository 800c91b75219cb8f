"""Instances that share a node's cores: decode steps make room while prefills wait."""

from __future__ import annotations

from collections.abc import Iterable

from kvasir.core.commands import ShareCores
from kvasir.core.request import Role
from kvasir.scheduling.instance import Instance


class CoreSharing:
    """Knows what each decode instance was told last, and says only what is new.

    Prefill runs at the lowest priority, so a decode batch that steps without a break would starve it. While a
    prefill is under way on its node, a decode instance pauses between its steps.
    """

    def __init__(self) -> None:
        self._told: dict[tuple[str, int], bool] = {}

    def commands(self, instances: Iterable[Instance]) -> list[ShareCores]:
        living = list(instances)
        busy = {i.info.node for i in living if i.info.role is Role.PREFILL and len(i.book)}
        wanted = {(i.info.id, i.info.epoch): i.info.role is Role.DECODE and i.info.node in busy for i in living}
        news = [ShareCores(key[0], want) for key, want in wanted.items() if want != self._told.get(key, False)]
        self._told = wanted
        return news
