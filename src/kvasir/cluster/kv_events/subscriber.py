"""Follows the KV events of any server that speaks vLLM's format, and mends what it missed where that can be mended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from hashlib import sha256

import structlog
import zmq

from kvasir.cluster.kv_events.follower import Follower, FollowerCounts
from kvasir.cluster.kv_events.publisher import END, PUB_HIGH_WATER_MARK
from kvasir.cluster.wire import Frames
from kvasir.core.errors import ConfigError

REPLAY_DEADLINE_S = 5.0
"""The longest wait for the next repeated message; vLLM answers between two of its own steps."""

MAX_REPLAYED = 1_000_000
"""More messages than any buffer: whoever sends so many without an end is not repeating."""


class KvEventSubscriber:
    """Feeds a Follower from a publisher's socket. `run` until it is cancelled; `close` afterwards.

    Messages are numbered. After a gap it asks the replay endpoint, from the last message that it has: when that comes back
    changed, the publisher is another one by now, and when it does not come back, something is lost for good. In both
    cases all is forgotten and what can be had is taken: a block too many would stay for ever, a block too few comes back.
    """

    def __init__(
        self,
        follower: Follower,
        endpoint: str,
        replay_endpoint: str | None = None,
        *,
        topic: str = "",
        replay_deadline_s: float = REPLAY_DEADLINE_S,
    ):
        """Raises ConfigError for an address that cannot be one."""
        self._follower = follower
        self._replay_endpoint = replay_endpoint
        self._replay_deadline_s = replay_deadline_s
        self._last: int | None = None  # number of the last message that was applied
        self._last_live: int | None = None
        self._last_digest = b""
        self._log = structlog.get_logger().bind(part="kv-events", endpoint=endpoint)
        if replay_endpoint is not None:
            _connected(zmq.DEALER, replay_endpoint).close()  # only to refuse now what would be refused later
        self._sub = _connected(zmq.SUB, endpoint)
        self._sub.socket.setsockopt_string(zmq.SUBSCRIBE, topic)

    @property
    def counts(self) -> FollowerCounts:
        return self._follower.counts

    @property
    def position(self) -> int | None:
        """Number of the last message that was applied."""
        return self._last

    def close(self) -> None:
        self._sub.close()

    async def run(self) -> None:
        """First what was published before, as far as it is kept, then what comes."""
        await self._catch_up(0)
        while True:
            frames = await self._sub.recv()
            match frames:
                case [_, number, payload] if len(number) == 8:
                    await self._take(int.from_bytes(number, "big"), payload)
                case _:
                    self.counts.garbage += 1

    async def _take(self, seq: int, payload: bytes) -> None:
        """A message from the live stream, whose numbers only grow."""
        if self._last_live is not None and seq <= self._last_live:
            self._log.info("the publisher started again", last=self._last_live, now=seq)
            self._start_over(is_restart=True)
        self._last_live = seq
        if self._last is None and seq > 0:
            await self._catch_up(0)
        elif self._last is not None and seq > self._last + 1:
            self.counts.gaps += 1
            await self._mend(self._last)
        if self._last is not None and seq <= self._last:
            self.counts.duplicates += 1
            return
        if seq != (0 if self._last is None else self._last + 1) and self._replay_endpoint is not None:
            self._log.warning("messages are missing that cannot be had", last=self._last, now=seq)
        self._apply(seq, payload)

    async def _mend(self, last: int) -> None:
        """Get what was published after message `last`, if it was this publisher that sent it."""
        is_same = False
        async with aclosing(self._replay(last)) as replayed:
            async for seq, payload in replayed:
                if not is_same:
                    is_same = seq == last and _digest(payload) == self._last_digest
                    if is_same:
                        continue
                    break
                self.counts.replayed += 1
                self._apply(seq, payload)
        if not is_same:
            self._start_over(is_restart=False)
            await self._catch_up(0)

    async def _catch_up(self, start: int) -> None:
        async with aclosing(self._replay(start)) as replayed:
            async for seq, payload in replayed:
                self.counts.replayed += 1
                self._apply(seq, payload)

    def _apply(self, seq: int, payload: bytes) -> None:
        self._follower.take(payload)
        self._last = seq
        self._last_digest = _digest(payload)

    def _start_over(self, *, is_restart: bool) -> None:
        if is_restart:
            self.counts.restarts += 1
        else:
            self.counts.resets += 1
        self._follower.forget()
        self._last = None
        self._last_digest = b""

    async def _replay(self, start: int) -> AsyncGenerator[tuple[int, bytes], None]:
        """Messages from number `start` on, each later than the one before, until the end or until none comes in time.

        A socket of its own for each question, so that late answers to an earlier one cannot be taken for this one's.
        """
        if self._replay_endpoint is None:
            return
        newest = start - 1
        channel = _connected(zmq.DEALER, self._replay_endpoint)
        try:
            channel.send([b"", start.to_bytes(8, "big")])
            for _ in range(MAX_REPLAYED):
                async with asyncio.timeout(self._replay_deadline_s):
                    frames = await channel.recv()
                match frames:
                    case [b"", number, _] if number == END:
                        return
                    case [b"", number, payload] if len(number) == 8 and int.from_bytes(number, "big") > newest:
                        newest = int.from_bytes(number, "big")
                        yield newest, payload
                    case _:
                        self.counts.garbage += 1
        except TimeoutError:
            self._log.warning("no answer from the replay endpoint", replay=self._replay_endpoint, wanted=start)
        finally:
            channel.close()


def _connected(kind: int, endpoint: str) -> Frames:
    frames = Frames(kind, PUB_HIGH_WATER_MARK)
    try:
        frames.socket.connect(endpoint)
    except zmq.ZMQError as error:
        frames.close()
        message = f"cannot follow KV events at {endpoint}: {error}; give an address such as tcp://host:5557"
        raise ConfigError(message) from None
    return frames


def _digest(payload: bytes) -> bytes:
    return sha256(payload).digest()
