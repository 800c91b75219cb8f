"""Transfers over TCP: several streams to each peer, large transfers sliced over them, slices of all transfers in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvasir.core.errors import TransferError
from kvasir.store.arena import Arena
from kvasir.store.messenger import tcp_wire as wire
from kvasir.store.messenger.spans import ArenaViews, SpanPair, check_spans, cut
from kvasir.store.messenger.tcp_path import Path, TcpLimits
from kvasir.store.messenger.tcp_transfer import Transfer
from kvasir.store.messenger.transport import PeerArena, Priority

__all__ = ["TcpLimits", "TcpTransport"]


class TcpTransport:
    """Reads from the TcpServers of other nodes into one local arena, and pushes from it into what they granted."""

    name = "tcp"

    def __init__(self, arena: Arena, limits: TcpLimits | None = None):
        self._arena = arena
        self._views = ArenaViews(arena)
        self._limits = limits if limits is not None else TcpLimits()
        self._paths: dict[tuple[bytes, str], Path] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._is_open = True

    def reaches(self, peer: PeerArena) -> bool:
        return peer.tcp is not None

    async def read(
        self,
        peer: PeerArena,
        spans: Sequence[SpanPair],
        *,
        deadline_s: float,
        priority: Priority = Priority.FETCH,
        on_part: Callable[[int], None] | None = None,
    ) -> None:
        """See Transport. A cancelled read keeps its connections: what still comes for it is read into nowhere."""
        await self._run(peer, self._transfer(wire.Op.GET, peer, spans, priority, on_part), deadline_s)

    async def push(
        self,
        peer: PeerArena,
        spans: Sequence[SpanPair],
        *,
        ticket: bytes,
        deadline_s: float,
        priority: Priority = Priority.FETCH,
        on_part: Callable[[int], None] | None = None,
    ) -> None:
        """Write local spans into slots that the peer's TcpServer granted by this ticket; returns when the peer has all of them.

        Raises TransferError. A push that failed or was cancelled may still go on for `window_bytes` on each stream, with
        whatever the local slots hold by then: only the peer's `revoke` ends its writing for sure.
        """
        await self._run(peer, self._transfer(wire.Op.PUT, peer, spans, priority, on_part, ticket), deadline_s)

    async def close(self) -> None:
        """End all transfers with TransferError and close all connections."""
        self._is_open = False
        if self._timer is not None:
            self._timer.cancel()
        for path in self._paths.values():
            path.close(TransferError("the transport was closed", cause="cut"))
        self._paths.clear()

    @property
    def num_queued(self) -> int:
        """Transfers that wait for their slices to be sent."""
        return sum(path.num_queued for path in self._paths.values())

    def _transfer(
        self,
        op: wire.Op,
        peer: PeerArena,
        spans: Sequence[SpanPair],
        priority: Priority,
        on_part: Callable[[int], None] | None,
        ticket: bytes = wire.NO_TICKET,
    ) -> Transfer:
        check_spans(spans, peer.arena, self._arena.handle)
        slices = cut(spans, max_bytes=min(self._limits.slice_bytes, wire.MAX_REQUEST_BYTES), max_pieces=wire.MAX_PIECES)
        return Transfer(op, slices, priority=priority, on_part=on_part, ticket=ticket)

    async def _run(self, peer: PeerArena, transfer: Transfer, deadline_s: float) -> None:
        if not transfer.has_more:
            return
        path = self._path(peer)
        if path.num_streams < (wanted := self._limits.streams if transfer.is_long else 1):
            await path.open_streams(wanted, deadline_s)
        path.add(transfer)
        timer = asyncio.get_running_loop().call_at(deadline_s, path.give_up, transfer)
        try:
            await transfer.done
        except BaseException:
            path.abandon(transfer)
            raise
        finally:
            timer.cancel()

    def _path(self, peer: PeerArena) -> Path:
        if not self._is_open or peer.tcp is None:
            why = "the transport was closed" if not self._is_open else f"node {peer.node} has no TCP server"
            raise TransferError(why, cause="refused")
        key = (peer.arena.id, peer.tcp)
        path = self._paths.get(key)
        if path is None:
            path = self._paths[key] = Path(peer, peer.tcp, self._views, self._limits)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._limits.stall_s, self._tick)
        return path

    def _tick(self) -> None:
        for key, path in list(self._paths.items()):
            path.tick()
            if path.is_unused:
                del self._paths[key]
        self._timer = asyncio.get_running_loop().call_later(self._limits.stall_s, self._tick) if self._paths else None
