"""The way to one arena over TCP: its connections, and the slices on them."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvasir.core.errors import TransferError
from kvasir.store.messenger import tcp_wire as wire
from kvasir.store.messenger.fair_queue import FairQueue
from kvasir.store.messenger.spans import ArenaViews, Slice
from kvasir.store.messenger.tcp_channel import Channel, repeated
from kvasir.store.messenger.tcp_server import prepare
from kvasir.store.messenger.tcp_transfer import Transfer
from kvasir.store.messenger.transport import PeerArena

SCRATCH_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class TcpLimits:
    """How a TcpTransport uses its connections.

    `streams` connections to a peer at most, each with slices of up to `slice_bytes`. More slices are asked for on a stream
    while less than `window_bytes` are on their way, so that the wire is not idle between small ones; the window is also what
    a hand-off may have to wait for. `max_queued` transfers wait for one peer at most. A connection is given up when
    connecting takes `connect_s`, when nothing moves for `stall_s` to twice that although something should, or after `idle_s`
    of rest.
    """

    streams: int = 2
    slice_bytes: int = 4 << 20
    window_bytes: int = 4 << 20
    max_queued: int = 1024
    connect_s: float = 2.0
    stall_s: float = 2.0
    idle_s: float = 60.0


class Path:
    """Keeps up to `limits.streams` connections to one incarnation of a peer's arena and shares them among transfers."""

    def __init__(self, peer: PeerArena, address: str, views: ArenaViews, limits: TcpLimits):
        self.peer = f"node {peer.node} at {address}"
        self._arena = peer.arena
        self._address = address
        self._views = views
        self._limits = limits
        self._queue: FairQueue[Transfer] = FairQueue()
        self._streams: list[_Stream] = []
        self._opening = asyncio.Lock()
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def is_unused(self) -> bool:
        return not self._streams and not self._queue and not self._opening.locked()

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    async def open_streams(self, wanted: int, deadline_s: float) -> None:
        """Have so many connections, or at least one. Raises TransferError when there is none in time."""
        try:
            async with asyncio.timeout_at(deadline_s), self._opening:
                await self._open_streams(wanted)
        except TimeoutError:
            raise TransferError(f"{self.peer} does not answer", cause="stalled") from None

    async def _open_streams(self, wanted: int) -> None:
        while len(self._streams) < wanted:
            try:
                sock = await self._connect()
            except TransferError:
                if self._streams:
                    return
                raise
            stream = _Stream(sock, self._views, self._scratch, peer=self.peer, ended=self._on_ended, free=self._pump)
            self._streams.append(stream)

    def add(self, transfer: Transfer) -> None:
        if not self._streams:
            raise TransferError(f"{self.peer} closed its connections", cause="cut")
        if len(self._queue) >= self._limits.max_queued:
            raise TransferError(f"{len(self._queue)} transfers wait for {self.peer}; no more are taken", cause="refused")
        stream = min(self._streams, key=_nbytes)
        if not self._queue and not transfer.is_long and stream.nbytes < self._limits.window_bytes:
            stream.start(transfer, transfer.take())  # the short way of a short transfer
            return
        self._queue.add(transfer)
        for stream in sorted(self._streams, key=_nbytes):
            self._pump(stream)

    def abandon(self, transfer: Transfer) -> None:
        """Nothing is written for this transfer from now on; may be called whatever became of it."""
        self._queue.remove(transfer)
        for stream in self._streams:
            stream.abandon(transfer)
        if not transfer.done.cancel() and not transfer.done.cancelled():
            transfer.done.exception()  # marks it as seen

    def give_up(self, transfer: Transfer) -> None:
        """Its deadline is over: end it, and close connections on which nothing moved for it, as the next one needs others."""
        transfer.fail(TransferError(f"transfer with {self.peer} outlived its deadline", cause="stalled"))
        for stream in [stream for stream in self._streams if stream.is_stuck_with(transfer)]:
            stream.lose(TransferError(f"{self.peer} stopped sending", cause="stalled"))

    def tick(self) -> None:
        """Called every `stall_s`: close connections that do not move although they should, and idle ones."""
        max_idle_ticks = max(1, round(self._limits.idle_s / self._limits.stall_s))
        for stream in list(self._streams):
            stream.tick()
            if stream.idle_ticks > max_idle_ticks:
                stream.lose(TransferError("idle", cause="cut"))
            elif stream.is_stalled:
                stream.lose(
                    TransferError(f"nothing moved to or from {self.peer} for {self._limits.stall_s} s", cause="stalled")
                )

    def close(self, error: TransferError) -> None:
        for stream in list(self._streams):
            stream.lose(error)

    async def _connect(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        host, _, port = self._address.rpartition(":")
        if not port.isdecimal():
            raise TransferError(f"{self._address!r} is not HOST:PORT", cause="refused")
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            sock.setblocking(False)
            prepare(sock)
            async with asyncio.timeout(self._limits.connect_s):
                await loop.sock_connect(sock, (host.strip("[]"), int(port)))
                await self._shake_hands(sock)
        except BaseException as error:
            sock.close()
            if isinstance(error, TimeoutError):
                raise TransferError(f"{self.peer} does not answer", cause="stalled") from None
            if isinstance(error, OSError):
                raise TransferError(f"cannot connect to {self.peer}: {error.strerror}", cause="refused") from error
            raise
        return sock

    async def _shake_hands(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, wire.pack_hello(self._arena.id))
        raw = bytearray(wire.WELCOME.size)
        got = 0
        while got < len(raw):
            step = await loop.sock_recv_into(sock, memoryview(raw)[got:])
            if not step:
                raise TransferError(f"{self.peer} hung up at the handshake", cause="cut")
            got += step
        wire.check_welcome(raw, self._arena, self.peer)

    def _pump(self, stream: _Stream) -> None:
        """Send slices until the stream has as many on their way as it may."""
        while self._queue and stream.is_open and stream.nbytes < self._limits.window_bytes:
            transfer = self._queue.next()
            if transfer is None:
                return
            piece = transfer.take()
            if not transfer.has_more:
                self._queue.remove(transfer)
            stream.start(transfer, piece)

    def _on_ended(self, stream: _Stream, error: TransferError) -> None:
        self._streams.remove(stream)
        failed = {id(flight.transfer): flight.transfer for flight in stream.flights}
        if not self._streams:
            while (transfer := self._queue.next()) is not None:
                failed[id(transfer)] = transfer
                self._queue.remove(transfer)
        for transfer in failed.values():
            self._queue.remove(transfer)
            transfer.fail(error)


class _Flight:
    """A slice that was asked for, or sent, and not yet answered."""

    def __init__(self, transfer: Transfer, piece: Slice, number: int):
        self.transfer = transfer
        self.piece = piece
        self.number = number
        self.is_abandoned = False
        self.moved_at_start = 0


class _Stream:
    """One connection: requests go out, answers come back in their order."""

    def __init__(
        self,
        sock: socket.socket,
        views: ArenaViews,
        scratch: memoryview,
        *,
        peer: str,
        ended: Callable[[_Stream, TransferError], None],
        free: Callable[[_Stream], None],
    ):
        self.flights: deque[_Flight] = deque()
        self.nbytes = 0
        self.idle_ticks = 0
        self._views = views
        self._scratch = scratch
        self._peer = peer
        self._ended = ended
        self._free = free
        self._channel = Channel(sock, self._lost)
        self._number = 0
        self._header = bytearray(wire.ANSWER.size)
        self._moved_at_tick: int | None = None
        self.is_stalled = False
        self._expect_answer()

    @property
    def is_open(self) -> bool:
        return self._channel.is_open

    def start(self, transfer: Transfer, piece: Slice) -> None:
        self._number = (self._number + 1) & 0xFFFFFFFF
        flight = _Flight(transfer, piece, self._number)
        self.flights.append(flight)
        self.nbytes += piece.nbytes
        request = wire.pack_request(transfer.op, flight.number, piece.pieces, piece.nbytes, transfer.ticket)
        payload = self._views.local(piece.pieces) if transfer.op == wire.Op.PUT else []
        self._channel.send([request, *payload])
        flight.moved_at_start = self._channel.moved
        if len(self.flights) == 1:  # now that the peer is at work
            self._expect_answer()

    def abandon(self, transfer: Transfer) -> None:
        """What still comes for this transfer goes nowhere."""
        for flight in self.flights:
            flight.is_abandoned |= flight.transfer is transfer
        if self.flights and self.flights[0].transfer is transfer:
            self._channel.divert(1, self._scratch)

    def is_stuck_with(self, transfer: Transfer) -> bool:
        return any(f.transfer is transfer and f.moved_at_start == self._channel.moved for f in self.flights)

    def lose(self, error: TransferError) -> None:
        self._channel.lose(error)

    def tick(self) -> None:
        moved = self._channel.moved
        self.idle_ticks = 0 if self.flights else self.idle_ticks + 1
        self.is_stalled = bool(self.flights) and moved == self._moved_at_tick
        self._moved_at_tick = moved

    def _expect_answer(self) -> None:
        """Also while nothing is on its way: then only the end of the connection can come."""
        views = [memoryview(self._header)]
        if self.flights and self.flights[0].transfer.op == wire.Op.GET:
            flight = self.flights[0]
            into = (
                repeated(self._scratch, flight.piece.nbytes) if flight.is_abandoned else self._views.local(flight.piece.pieces)
            )
            views += into
        self._channel.expect(views, self._on_answer, at_once=bool(self.flights))

    def _on_answer(self) -> None:
        if not self.flights:
            self.lose(TransferError(f"{self._peer} sent bytes that nobody asked for", cause="garbled"))
            return
        flight = self.flights[0]
        nbytes = flight.piece.nbytes if flight.transfer.op == wire.Op.GET else 0
        try:
            wire.check_answer(self._header, number=flight.number, nbytes=nbytes, peer=self._peer)
        except TransferError as error:
            self.lose(error)
            return
        self.flights.popleft()
        self.nbytes -= flight.piece.nbytes
        self._expect_answer()
        if not flight.is_abandoned:
            flight.transfer.arrive(flight.piece)
        self._free(self)

    def _lost(self, error: TransferError) -> None:
        self._ended(self, error)


def _nbytes(stream: _Stream) -> int:
    return stream.nbytes
