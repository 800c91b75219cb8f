"""Carries out what a pool brings from other nodes, by the messenger."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvasir.cluster.bringer import Pairs
from kvasir.core.usage import TransportUsage
from kvasir.store.messenger import PeerArena, Priority
from kvasir.store.messenger.messenger import Fetch, Messenger, Source


class MessengerMover:
    """Implements `Mover`."""

    def __init__(self, messenger: Messenger):
        self._messenger = messenger

    def usage(self) -> tuple[TransportUsage, ...]:
        """What each transport did since the start."""
        return tuple(
            TransportUsage(name, s.nbytes, s.transfers, s.failures.total(), s.retries, s.seconds, s.active)
            for name, s in self._messenger.stats.items()
        )

    async def read(
        self,
        peer: PeerArena,
        pairs: Pairs,
        *,
        within_s: float,
        priority: Priority,
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        """Raises TransferError."""
        there, here = zip(*pairs, strict=True)
        deadline_s = asyncio.get_running_loop().time() + within_s
        await self._messenger.fetch(Fetch((Source(peer, there),), here, deadline_s, priority, on_layer))
