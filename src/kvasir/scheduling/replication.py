"""Copies of hot prefixes: made ahead of the fetches that would otherwise queue at the only node that has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from kvasir.core.commands import Candidate, Replicate
from kvasir.core.keys import BlockKey
from kvasir.pool.directory import BlockDirectory
from kvasir.scheduling.fleet import Fleet

WINDOW_S = 10.0
"""What a node sent is forgotten at this rate: a few times as long as a large prefix takes over a slow network."""

CONGESTED = 0.3
"""Share of the window for which a node may be busy sending before its hottest prefixes are copied. At 0.3 a fetch that
arrives at random waits for another in less than a third of all cases."""

MAX_COPIES = 4
"""Nodes that hold a prefix before no more copies are made: each takes room from something else."""


class Replication(Protocol):
    """Told of each placement, says what should be copied."""

    def placed(
        self, keys: tuple[BlockKey, ...], candidate: Candidate, fleet: Fleet, directory: BlockDirectory, now: float
    ) -> list[Replicate]: ...


class HotPrefixes:
    """Copies the prefix that was just fetched when its source is predicted to be congested.

    The copy goes to the node of the prefill instance with the least to do that lacks it; fetching itself leaves one more
    on the instance that computes. One copy of a source is under way at a time, and a prefix has at most MAX_COPIES.
    """

    def __init__(self, transfer_s: Callable[[int], float]):
        """`transfer_s` predicts the seconds that so many tokens take from node to node."""
        self._transfer_s = transfer_s
        self._busy: dict[str, tuple[float, float]] = {}  # node → seconds of sending in the window, as of
        self._next_s: dict[str, float] = {}

    def placed(
        self, keys: tuple[BlockKey, ...], candidate: Candidate, fleet: Fleet, directory: BlockDirectory, now: float
    ) -> list[Replicate]:
        source = candidate.source
        if source is None or not keys:
            return []
        seconds = self._transfer_s(candidate.fetch_tokens)
        busy_s = self._decayed(source, now) + seconds
        self._busy[source] = busy_s, now
        if busy_s < CONGESTED * WINDOW_S or now < self._next_s.get(source, -math.inf):
            return []
        holders = directory.holders(keys[-1])
        if len(holders) >= MAX_COPIES:
            return []
        taken = {*holders, fleet[candidate.instance].info.node}
        others = [i for i in fleet.prefillers if i.info.node not in taken]
        if not others:
            return []
        target = min(others, key=lambda i: (i.book.wait_s(now), i.info.id)).info.node
        self._next_s[source] = now + self._transfer_s(candidate.prefix_tokens)
        return [Replicate(source, target, keys)]

    def _decayed(self, node: str, now: float) -> float:
        busy_s, as_of_s = self._busy.get(node, (0.0, now))
        return busy_s * math.exp((as_of_s - now) / WINDOW_S)


REPLICATIONS: dict[str, Callable[[Callable[[int], float]], Replication | None]] = {
    "none": lambda transfer_s: None,
    "hot": HotPrefixes,
}
"""Name on the command line → (seconds to transfer so many tokens) → the rule; None: copies come from fetches alone."""
