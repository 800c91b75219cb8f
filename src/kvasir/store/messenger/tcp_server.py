"""The side of TCP transfers that owns the arena which others read from, or push into where it was granted."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvasir.core.errors import ConfigError, TransferError
from kvasir.store.arena import Arena
from kvasir.store.messenger import tcp_wire as wire
from kvasir.store.messenger.spans import ArenaViews
from kvasir.store.messenger.tcp_channel import Channel, repeated

DISCARD_BYTES = 4 << 20
"""What a refused client may still have on its way: read and dropped, or its end would be a reset that eats the refusal."""


@dataclass(slots=True)
class ServerCounts:
    """Since the start; `refused` by the name of its code."""

    accepted: int = 0
    requests: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    stalled: int = 0
    revoked: int = 0
    refused: Counter[str] = field(default_factory=Counter)


class TcpServer:
    """Serves one arena on one port. Made by `start`; `address` is HOST:PORT for PeerArena.

    Who knows the arena's id may read any slot of it: a random number of 16 bytes, told only to nodes of the cluster. Pushes go
    only into slots that were granted, each grant with a ticket of its own.
    """

    def __init__(self, arena: Arena, listening: socket.socket, *, max_connections: int, stall_s: float):
        self.counts = ServerCounts()
        self.arena = arena
        self.views = ArenaViews(arena)
        self.scratch = memoryview(bytearray(256 << 10))
        self._socket = listening
        self._max_connections = max_connections
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._connections: set[_Connection] = set()
        self._grants: dict[bytes, frozenset[int]] = {}
        self._is_open = True
        self._loop.add_reader(listening.fileno(), self._accept)
        self._timer = self._loop.call_later(stall_s, self._tick)

    @classmethod
    async def start(
        cls, arena: Arena, host: str, port: int = 0, *, max_connections: int = 256, stall_s: float = 5.0
    ) -> TcpServer:
        """Listen. A connection that rests in the middle of something for `stall_s`, or up to twice that, is closed."""
        try:
            listening = socket.create_server((host, port), backlog=128)
        except OSError as error:
            raise ConfigError(f"cannot listen for transfers on {host}:{port}: {error.strerror}") from error
        prepare(listening)
        listening.setblocking(False)
        return cls(arena, listening, max_connections=max_connections, stall_s=stall_s)

    @property
    def address(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"{host}:{port}"

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    def grant(self, slots: Iterable[int]) -> bytes:
        """Let others push into these slots, which the caller has reserved. Returns the ticket that they must show."""
        ticket = secrets.token_bytes(wire.ID_BYTES)
        self._grants[ticket] = frozenset(slots)
        return ticket

    def revoke(self, ticket: bytes) -> None:
        """End a grant; when this returns nobody writes into its slots. Unknown tickets are ignored."""
        self._grants.pop(ticket, None)
        for connection in [c for c in self._connections if c.ticket == ticket]:
            self.counts.revoked += 1
            connection.close()

    def is_granted(self, ticket: bytes, slots: Iterable[int]) -> bool:
        return self._grants.get(ticket, frozenset[int]()).issuperset(slots)

    def forget(self, connection: _Connection) -> None:
        self._connections.discard(connection)

    async def close(self) -> None:
        """Stop listening and close all connections, in the middle of what they do."""
        if not self._is_open:
            return
        self._is_open = False
        self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for connection in list(self._connections):
            connection.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:  # out of descriptors: look again at the next tick instead of spinning
            self._loop.remove_reader(self._socket.fileno())
            return
        self.counts.accepted += 1
        connection = _Connection(self, sock)
        self._connections.add(connection)
        if len(self._connections) > self._max_connections:
            connection.refuse_welcome(wire.Code.BUSY)

    def _tick(self) -> None:
        for connection in list(self._connections):
            connection.drop_if_stalled()
        self._loop.add_reader(self._socket.fileno(), self._accept)
        self._timer = self._loop.call_later(self._stall_s, self._tick)


class _Connection:
    """One client: a hello, then requests, each answered before the next is read."""

    def __init__(self, server: TcpServer, sock: socket.socket):
        self.ticket: bytes | None = None
        self._server = server
        self._channel = Channel(sock, self._lost, self._drained)
        self._is_busy = True
        self._is_refused = False
        self._moved_at_tick = self._moved_at_rest = -1
        self._raw = bytearray(wire.HELLO.size)
        self._channel.expect([memoryview(self._raw)], self._on_hello)

    def close(self) -> None:
        self.ticket = None
        self._channel.close()
        self._server.forget(self)

    def drop_if_stalled(self) -> None:
        """Close when nothing moved since the last call although something should have."""
        is_resting = not self._is_busy and self._channel.moved == self._moved_at_rest
        if self._is_refused or (not is_resting and self._channel.moved == self._moved_at_tick):
            self._server.counts.stalled += not self._is_refused
            self.close()
        self._moved_at_tick = self._channel.moved

    def refuse_welcome(self, code: wire.Code) -> None:
        self._refuse(code, wire.pack_welcome(code, self._server.arena.handle))

    def _lost(self, _: TransferError) -> None:
        self.ticket = None
        self._server.forget(self)

    def _drained(self) -> None:
        if self._is_refused:
            self._channel.end_sending()
        elif self._is_busy:
            self._await_request()

    def _on_hello(self) -> None:
        try:
            arena_id = wire.unpack_hello(self._raw)
        except wire.Garbled:
            self.refuse_welcome(wire.Code.GARBLED)
            return
        if arena_id != self._server.arena.handle.id:
            self.refuse_welcome(wire.Code.STALE_ARENA)
            return
        self._answer([wire.pack_welcome(wire.Code.OK, self._server.arena.handle)])

    def _await_request(self) -> None:
        self._is_busy = False
        self._moved_at_rest = self._channel.moved
        self._raw = bytearray(wire.REQUEST.size + wire.PLACE.size)  # each request has at least one place
        self._channel.expect([memoryview(self._raw)], self._on_request, at_once=False)

    def _on_request(self) -> None:
        self._is_busy = True
        self._server.counts.requests += 1
        try:
            request = wire.unpack_request(self._raw)
        except wire.Garbled:
            self._refuse(wire.Code.GARBLED, wire.pack_answer(wire.Code.GARBLED, 0, 0))
            return
        first = wire.unpack_places(memoryview(self._raw)[wire.REQUEST.size :])
        if request.num_pieces == 1:
            self._on_places(request, first)
            return
        raw = bytearray((request.num_pieces - 1) * wire.PLACE.size)
        self._channel.expect([memoryview(raw)], lambda: self._on_places(request, first + wire.unpack_places(raw)))

    def _on_places(self, request: wire.Request, places: list[tuple[int, int, int]]) -> None:
        code = self._judge(request, places)
        if code != wire.Code.OK:
            self._refuse(code, wire.pack_answer(code, request.number, 0))
            return
        views = self._server.views.at(places)
        if request.op == wire.Op.GET:
            self._server.counts.sent_bytes += request.nbytes
            self._answer([wire.pack_answer(wire.Code.OK, request.number, request.nbytes), *views])
            return
        self.ticket = request.ticket
        self._channel.expect(views, lambda: self._on_pushed(request))

    def _on_pushed(self, request: wire.Request) -> None:
        self.ticket = None
        self._server.counts.received_bytes += request.nbytes
        self._answer([wire.pack_answer(wire.Code.OK, request.number, 0)])

    def _judge(self, request: wire.Request, places: list[tuple[int, int, int]]) -> wire.Code:
        handle = self._server.arena.handle
        for slot, offset, length in places:
            if slot >= handle.num_slots or not length or offset + length > handle.slot_bytes:
                return wire.Code.OUT_OF_RANGE
        if sum(length for _, _, length in places) != request.nbytes:
            return wire.Code.GARBLED
        if request.op == wire.Op.PUT and not self._server.is_granted(request.ticket, [slot for slot, _, _ in places]):
            return wire.Code.NOT_GRANTED
        return wire.Code.OK

    def _answer(self, views: list[bytes | memoryview]) -> None:
        """The next request is read when this has gone to the kernel: a client that does not read holds up only itself."""
        self._channel.send(views)
        if not self._channel.is_sending:
            self._await_request()

    def _refuse(self, code: wire.Code, last_word: bytes) -> None:
        self._server.counts.refused[code.name.lower()] += 1
        self._is_refused = True
        self._channel.expect(repeated(self._server.scratch, DISCARD_BYTES), self.close)
        self._channel.send([last_word])
        if not self._channel.is_sending:
            self._channel.end_sending()


def prepare(sock: socket.socket) -> None:
    """Before it is connected, or of one that listens: its connections inherit it.

    Congestion control is the host's default unless that is BBR, whose model of a long path paces each burst by timers: between
    the machines of a cluster that takes longer than the bytes. Then it is Reno, which every Linux lets anybody choose.
    """
    if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"bbr"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    keep_alive(sock)


def keep_alive(sock: socket.socket) -> None:
    """Notice within half a minute that the other machine is gone, also while nothing is said."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
