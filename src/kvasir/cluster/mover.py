"""Brings blocks by the transports: whole ones, or one layer of all of them after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvasir.cluster.bringer import Pairs
from kvasir.core.errors import TransferError
from kvasir.store.arena import Arena
from kvasir.store.messenger import PeerArena, Priority, SpanPair, Transport


class TransportMover:
    """Implements `Mover` over transports, the best first: what one of them cannot bring, the next one tries."""

    def __init__(self, arena: Arena, num_layers: int, transports: Sequence[Transport]):
        self._slot_bytes = arena.handle.slot_bytes
        self._num_layers = num_layers
        self._transports = transports

    async def read(
        self,
        peer: PeerArena,
        pairs: Pairs,
        *,
        within_s: float,
        priority: int,
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        deadline_s = asyncio.get_running_loop().time() + within_s
        num_layers = 1 if on_layer is None else self._num_layers
        spans = self._spans(pairs, num_layers)

        def part(complete: int) -> None:
            if on_layer is not None:
                on_layer(complete // len(pairs))

        ways = [transport for transport in self._transports if transport.reaches(peer)]
        for number, transport in enumerate(ways, start=1):
            try:
                await transport.read(peer, spans, deadline_s=deadline_s, priority=Priority(priority), on_part=part)
                return
            except TransferError as error:
                if number == len(ways) or error.cause == "stale_arena":
                    raise
        raise TransferError(f"no path to node {peer.node}", cause="refused")

    def _spans(self, pairs: Pairs, num_layers: int) -> list[SpanPair]:
        layer_bytes = self._slot_bytes // num_layers
        offsets = [layer * layer_bytes for layer in range(num_layers)]
        return [SpanPair(there, here, offset, layer_bytes) for offset in offsets for there, here in pairs]

    async def close(self) -> None:
        for transport in self._transports:
            await transport.close()
