"""Carries out what a pool brings from other nodes, by the messenger."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvasir.cluster.bringer import Pairs
from kvasir.core.usage import TransportStats
from kvasir.store.messenger import PeerArena, Priority
from kvasir.store.messenger.messenger import Fetch, Messenger, Source
from kvasir.store.messenger.statistics import TransportStats as Statistics


class MessengerMover:
    """Implements `Mover`."""

    def __init__(self, messenger: Messenger):
        self._messenger = messenger

    async def read(
        self,
        peer: PeerArena,
        pairs: Pairs,
        *,
        within_s: float,
        priority: int,
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        """Raises TransferError."""
        there, here = zip(*pairs, strict=True)
        deadline_s = asyncio.get_running_loop().time() + within_s
        await self._messenger.fetch(Fetch((Source(peer, there),), here, deadline_s, Priority(priority), on_layer))

    def stats(self) -> tuple[TransportStats, ...]:
        return tuple([_reported(name, stats) for name, stats in self._messenger.stats.items()])


def _reported(name: str, stats: Statistics) -> TransportStats:
    return TransportStats(
        name,
        bytes=stats.nbytes,
        transfers=stats.transfers,
        failures=stats.failures.total(),
        retries=stats.retries,
        seconds=stats.seconds,
        queued=stats.active,
    )
