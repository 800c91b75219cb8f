"""The state of a simulated cluster now and then, for plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from msgspec import Struct

from kvasir.core.keys import BlockKey
from kvasir.core.request import Role


class Sample(Struct, frozen=True):
    """At `at_s`. Instances and nodes are in order of their ids, as in `Run.instances` and `Run.nodes`.

    `wait_s`: predicted seconds of prefill queued; NaN-free, 0 for an instance that is down. `hot_replicas`: on how many nodes
    each of the most hit blocks is, the most hit first.
    """

    at_s: float
    arrived: int
    rejected: int
    wait_s: tuple[float, ...]
    decode_batch: tuple[int, ...]
    roles: tuple[Role, ...]
    pool_blocks: tuple[int, ...]
    hot_replicas: tuple[int, ...]


class HotBlocks:
    """The blocks hit most so far. Counts only grow, so the next top is among the last one and what was hit `since`."""

    __slots__ = ("_count", "_hits", "_since", "_top")

    def __init__(self, count: int):
        self._count = count
        self._hits: Counter[BlockKey] = Counter()
        self._since: list[Sequence[BlockKey]] = []
        self._top: list[BlockKey] = []

    def hit(self, keys: Sequence[BlockKey]) -> None:
        """Counted when the next top is wanted."""
        if self._count:
            self._since.append(keys)

    def top(self) -> list[BlockKey]:
        """The most hit first; ties by key."""
        hits, since = self._hits, list(chain.from_iterable(self._since))
        hits.update(since)
        candidates = {*since, *self._top}
        in_order = sorted(map(hits.__getitem__, candidates), reverse=True)
        least = in_order[: self._count][-1] if in_order else 0
        among = [key for key in candidates if hits[key] >= least]
        self._top = sorted(among, key=lambda key: (-hits[key], key))[: self._count]
        self._since.clear()
        return self._top
