"""The same channels inside one process, for deterministic tests: no socket, no thread, no clock."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, Protocol

import msgspec

from kvasir.cluster.wire import HIGH_WATER_MARK, MALFORMED, YIELD_AFTER, In, Out


class MemoryListener(Generic[In, Out]):
    """A listener whose peers live in the same process. Messages travel encoded, as they would between processes."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[In], *, high_water_mark: int = HIGH_WATER_MARK):
        self._inbox: _Queue[tuple[str, bytes]] = _Queue()
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self._limit = high_water_mark
        self._waiting: dict[str, int] = {}
        self._peers: dict[str, _Queue[bytes]] = {}
        self.dropped = 0

    async def recv(self) -> tuple[str, In]:
        while True:
            name, payload = await self._inbox.get()
            self._waiting[name] -= 1
            try:
                return name, self._decoder.decode(payload)
            except MALFORMED:
                self.dropped += 1

    def send(self, peer: str, message: Out) -> bool:
        queue = self._peers.get(peer)
        if queue is None or len(queue) >= self._limit:
            return False
        queue.put(self._encoder.encode(message))
        return True

    def close(self) -> None:
        self._peers.clear()

    def attach(self, name: str) -> _Queue[bytes]:
        """Register a peer; a newer one takes the name over. Returns the queue of what is sent to it."""
        self._peers[name] = _Queue()
        return self._peers[name]

    def detach(self, name: str, queue: _Queue[bytes]) -> None:
        if self._peers.get(name) is queue:
            del self._peers[name]

    def deliver(self, name: str, payload: bytes) -> bool:
        """What peer `name` sent; False when too much of it waits already."""
        if self._waiting.get(name, 0) >= self._limit:
            return False
        self._waiting[name] = self._waiting.get(name, 0) + 1
        self._inbox.put((name, payload))
        return True


class Port(Protocol):
    """What a channel needs of a listener; like a socket, it does not know which messages go through."""

    def attach(self, name: str) -> _Queue[bytes]: ...

    def detach(self, name: str, queue: _Queue[bytes]) -> None: ...

    def deliver(self, name: str, payload: bytes) -> bool: ...


class MemoryChannel(Generic[In, Out]):
    """A peer of a MemoryListener, which may know more message types than this end does."""

    def __init__(self, listener: Port, name: str, decoder: msgspec.msgpack.Decoder[In]):
        self._listener = listener
        self._name = name
        self._queue = listener.attach(name)
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self.dropped = 0

    async def recv(self) -> In:
        while True:
            payload = await self._queue.get()
            try:
                return self._decoder.decode(payload)
            except MALFORMED:
                self.dropped += 1

    def send(self, message: Out) -> bool:
        return self._listener.deliver(self._name, self._encoder.encode(message))

    def close(self) -> None:
        self._listener.detach(self._name, self._queue)


class _Queue(deque[In]):
    """A queue for one reader; its bound is the sender's to keep."""

    def __init__(self) -> None:
        super().__init__()
        self._filled = asyncio.Event()
        self._since_yield = 0

    def put(self, item: In) -> None:
        self.append(item)
        self._filled.set()

    async def get(self) -> In:
        self._since_yield += 1
        if self._since_yield >= YIELD_AFTER:
            self._since_yield = 0
            await asyncio.sleep(0)
        while not self:
            self._filled.clear()
            await self._filled.wait()
        return self.popleft()
