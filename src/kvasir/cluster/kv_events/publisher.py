"""Publishes the cluster's block events as a vLLM does: ZeroMQ PUB, and a ROUTER that repeats what a subscriber missed.

A subscriber of everything sees one gapless count of messages. Each node has a topic, `kv@NODE@MODEL`, and a data-parallel rank,
which also the repeated payloads carry. A repeat is asked for with an empty frame and 8 bytes, the first number wanted; the
answer is (empty, number, payload) for each message, and at the end number -1 with an empty payload. Whoever asks for more
than is kept gets a snapshot instead, under the latest numbers: each node cleared, then all its blocks.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import structlog
import zmq

from kvasir.cluster.kv_events.format import Batch, KvEvent, WireFormat, encode
from kvasir.cluster.kv_events.stream import EventStream
from kvasir.cluster.wire import Frames
from kvasir.core.errors import ConfigError
from kvasir.core.events import Event
from kvasir.core.keys import BlockKey

BUFFER_STEPS = 10_000
"""Messages kept for repetition; vLLM's default."""

BUFFER_BYTES = 256 << 20
"""They take no more memory than this."""

PUB_HIGH_WATER_MARK = 100_000
"""Messages that may wait for one slow subscriber, then it misses some; vLLM's default."""

YIELD_AFTER = 256
"""Repeated messages sent without letting other tasks run."""

END = (-1).to_bytes(8, "big", signed=True)


class KvEventPublisher:
    """`hear` is for `Hub.on_event`. Lives in one event loop, between entering and leaving `running`."""

    def __init__(
        self,
        stream: EventStream,
        *,
        endpoint: str,
        replay_endpoint: str | None,
        model: str,
        wire: WireFormat,
        buffer_steps: int = BUFFER_STEPS,
        clock: Callable[[], float] = time.time,
    ):
        self._stream = stream
        self._model = model
        self._wire = wire
        self._clock = clock
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = 0
        self._buffer_steps = buffer_steps
        self._seq = 0
        self._flush_due = False
        self.counts: Counter[str] = Counter()
        self._log = structlog.get_logger().bind(part="kv-events")
        self._pub = _bound(zmq.PUB, PUB_HIGH_WATER_MARK, endpoint, "--kv-events")
        self._router: Frames | None = None
        if replay_endpoint is not None:
            try:
                self._router = _bound(zmq.ROUTER, 2 * buffer_steps + 1, replay_endpoint, "--kv-events-replay")
            except ConfigError:
                self._pub.close()
                raise
            self._router.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[KvEventPublisher]:
        repeating = asyncio.create_task(self._repeat(), name="kv-events-replay")
        try:
            yield self
        finally:
            repeating.cancel()
            await asyncio.gather(repeating, return_exceptions=True)
            self.close()

    @property
    def endpoint(self) -> str:
        """Where it publishes, with the port that was found when it was left open."""
        return self._pub.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def replay_endpoint(self) -> str | None:
        return None if self._router is None else self._router.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        """What `running` does at its end."""
        self._pub.close()
        if self._router is not None:
            self._router.close()

    def learn(self, keys: Sequence[BlockKey], tokens: Sequence[int], parent: BlockKey | None, salt: str) -> None:
        """Which tokens these blocks stand for, so that subscribers can be told; for `Hub.on_blocks`."""
        self._stream.lineage.learn(keys, tokens, parent=parent, salt=salt)

    def hear(self, event: Event) -> None:
        """Publish what the event means for subscribers, at the end of this turn of the loop, so that a burst is one message."""
        if self._stream.hear(event) and not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Publish what is untold. A slow subscriber misses what it does not take: PUB waits for nobody."""
        self._flush_due = False
        if self._pub.socket.closed:
            return
        for node, events in self._stream.take():
            payload = self._payload(node, events)
            self._keep(payload)
            self._pub.send([f"kv@{node}@{self._model}".encode(), self._seq.to_bytes(8, "big"), payload])
            self.counts["batches"] += 1
            self.counts["events"] += len(events)
            self._seq += 1

    def _keep(self, payload: bytes) -> None:
        if self._router is None:
            return
        self._kept.append((self._seq, payload))
        self._kept_bytes += len(payload)
        while len(self._kept) > self._buffer_steps or (self._kept_bytes > BUFFER_BYTES and len(self._kept) > 1):
            self._kept_bytes -= len(self._kept.popleft()[1])

    def _payload(self, node: str, events: tuple[KvEvent, ...]) -> bytes:
        return encode(Batch(self._clock(), events, self._stream.rank_of(node)), self._wire.shape)

    async def _repeat(self) -> None:
        """Answer those who missed something."""
        if self._router is None:
            return
        while True:
            frames = await self._router.recv()
            match frames:
                case [client, b"", start] if len(start) == 8:
                    self.counts["replays"] += 1
                    await self._answer(self._router, client, int.from_bytes(start, "big"))
                case _:
                    self.counts["garbage"] += 1

    async def _answer(self, router: Frames, client: bytes, start: int) -> None:
        """Without waiting for the client: what it does not take is dropped, and it asks again."""
        self.flush()
        for count, (seq, payload) in enumerate(self._since(start)):
            if not router.send([client, b"", seq.to_bytes(8, "big"), payload]):
                self._log.warning("a subscriber did not take what it asked for", wanted=start, got=count)
                return
            if count % YIELD_AFTER == YIELD_AFTER - 1:
                await asyncio.sleep(0)
        router.send([client, b"", END, b""])

    def _since(self, start: int) -> list[tuple[int, bytes]]:
        oldest = self._kept[0][0] if self._kept else self._seq
        if start >= oldest:
            return [(seq, payload) for seq, payload in self._kept if seq >= start]
        return list(self._numbered(self._stream.snapshot())) or list(self._kept)

    def _numbered(self, batches: list[tuple[str, tuple[KvEvent, ...]]]) -> Iterable[tuple[int, bytes]]:
        """The snapshot under the latest numbers; nothing if it has more batches than there are numbers."""
        first = self._seq - len(batches)
        if first < 0:
            return ()
        self.counts["snapshots"] += 1
        return [(first + at, self._payload(node, events)) for at, (node, events) in enumerate(batches)]


def _bound(kind: int, high_water_mark: int, endpoint: str, flag: str) -> Frames:
    frames = Frames(kind, high_water_mark)
    try:
        frames.socket.bind(endpoint)
    except zmq.ZMQError as error:
        frames.close()
        message = f"{flag}: cannot listen on {endpoint}: {error}; give a free address such as tcp://127.0.0.1:5557"
        raise ConfigError(message) from None
    return frames
