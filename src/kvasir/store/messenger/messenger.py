"""Brings blocks from whoever has them: picks source and transport, retries on another, tells of layers as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvasir.core.errors import TransferError
from kvasir.store.messenger.spans import SpanPair
from kvasir.store.messenger.statistics import TransportStats
from kvasir.store.messenger.topology import Topology
from kvasir.store.messenger.transport import PeerArena, Priority, Transport


@dataclass(frozen=True, slots=True)
class Source:
    """Somebody who has all the blocks: `slots[i]` of its arena holds block i, leased until the fetch is over."""

    peer: PeerArena
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fetch:
    """Blocks to bring into `slots`, which the caller has reserved. `deadline_s` and `late_s` are times of the loop's clock.

    The first layer of all blocks comes first, then the second, and so on, if `on_layer` wants to hear how many have come.
    Once it has heard of a layer no other source is asked: whoever computes on the layer needs this source's confirmation.
    `on_late` is called once if `late_s` passes before the end: time to race it against recompute.
    """

    sources: tuple[Source, ...]
    slots: tuple[int, ...]
    deadline_s: float
    priority: Priority = Priority.FETCH
    on_layer: Callable[[int], None] | None = None
    late_s: float | None = None
    on_late: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """All blocks are here, all from `node`: they count only if it confirms the lease. `transport` brought the last of them."""

    node: str
    transport: str
    nbytes: int
    seconds: float
    tries: int


@dataclass(frozen=True, slots=True)
class MessengerLimits:
    """`max_tries` attempts per fetch; a path that failed is tried last for `rest_s`; `max_active` fetches at a time."""

    max_tries: int = 4
    rest_s: float = 5.0
    max_active: int = 1024


@dataclass(frozen=True, slots=True)
class _Attempt:
    source: Source
    transport: Transport

    @property
    def path(self) -> tuple[str, bytes, str]:
        return self.source.peer.node, self.source.peer.arena.id, self.transport.name


@dataclass(slots=True)
class _Progress:
    """How many leading spans are here, all from one source, and how many layers somebody was told of."""

    source: Source | None = None
    spans: int = 0
    told_layers: int = 0


class Messenger:
    """For one local arena whose slots hold `num_layers` equal layers, on one event loop.

    `transports` are in order of preference: shm before nixl before tcp. It owns and closes them.
    """

    def __init__(
        self,
        node: str,
        transports: Sequence[Transport],
        *,
        slot_bytes: int,
        num_layers: int,
        topology: Topology | None = None,
        limits: MessengerLimits | None = None,
    ):
        if slot_bytes % num_layers:
            raise ValueError(f"a slot of {slot_bytes} bytes does not hold {num_layers} equal layers")
        self.stats = {transport.name: TransportStats() for transport in transports}
        self._node = node
        self._transports = tuple(transports)
        self._slot_bytes = slot_bytes
        self._num_layers = num_layers
        self._topology = topology if topology is not None else Topology()
        self._limits = limits if limits is not None else MessengerLimits()
        self._failed_at: dict[tuple[str, bytes, str], float] = {}
        self._active = 0

    async def fetch(self, fetch: Fetch) -> Fetched:
        """Returns when all bytes are in the local slots; raises the last TransferError when no path brought them.

        When it has returned, raised or been cancelled, nothing writes into the slots any more.
        """
        if any(len(source.slots) != len(fetch.slots) for source in fetch.sources):
            raise ValueError(f"each source must name {len(fetch.slots)} slots, one for each local slot")
        if self._active >= self._limits.max_active:
            raise TransferError(f"{self._active} fetches are under way; no more are taken", cause="refused")
        loop = asyncio.get_running_loop()
        late = None
        if fetch.late_s is not None and fetch.on_late is not None:
            late = loop.call_at(fetch.late_s, fetch.on_late)
        self._active += 1
        try:
            return await self._fetch(fetch, loop.time())
        finally:
            self._active -= 1
            if late is not None:
                late.cancel()

    async def fetch_all(self, fetches: Sequence[Fetch]) -> list[Fetched | TransferError]:
        """The outcome of each, when all have ended; one that fails does not disturb the others."""

        async def outcome(fetch: Fetch) -> Fetched | TransferError:
            try:
                return await self.fetch(fetch)
            except TransferError as error:
                return error

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(outcome(fetch)) for fetch in fetches]
        return [task.result() for task in tasks]

    async def close(self) -> None:
        for transport in self._transports:
            await transport.close()

    async def _fetch(self, fetch: Fetch, started_s: float) -> Fetched:
        loop = asyncio.get_running_loop()
        attempts = self._attempts(fetch)
        progress = _Progress()
        error = TransferError("no transport reaches any source", cause="refused")
        for number in range(self._limits.max_tries):
            if not attempts or loop.time() >= fetch.deadline_s:
                break
            attempt, *attempts = attempts
            share = 0.5 if attempts and number < self._limits.max_tries - 1 else 1.0
            deadline_s = loop.time() + share * (fetch.deadline_s - loop.time())
            self.stats[attempt.transport.name].retries += number > 0
            try:
                await self._try(attempt, fetch, progress, deadline_s)
            except TransferError as failure:
                error = failure
                attempts = _after(attempt, attempts, failure, progress)
                continue
            nbytes, seconds = len(fetch.slots) * self._slot_bytes, loop.time() - started_s
            return Fetched(attempt.source.peer.node, attempt.transport.name, nbytes, seconds, number + 1)
        raise error

    async def _try(self, attempt: _Attempt, fetch: Fetch, progress: _Progress, deadline_s: float) -> None:
        """One attempt at what is still missing of this source's blocks, or at all of them."""
        if progress.source is not attempt.source:
            progress.source, progress.spans = attempt.source, 0
        loop, stats = asyncio.get_running_loop(), self.stats[attempt.transport.name]
        started_s, had = loop.time(), progress.spans
        spans = self._spans(attempt.source, fetch)

        def on_part(count: int) -> None:
            progress.spans = had + count
            layers = progress.spans // len(fetch.slots)
            if fetch.on_layer is not None and layers > progress.told_layers:
                progress.told_layers = layers
                fetch.on_layer(layers)

        stats.active += 1
        try:
            await attempt.transport.read(
                attempt.source.peer, spans[had:], deadline_s=deadline_s, priority=fetch.priority, on_part=on_part
            )
        except TransferError as failure:
            stats.failures[failure.cause] += 1
            self._failed_at[attempt.path] = loop.time()
            raise
        finally:
            stats.active -= 1
            came = sum(span.length for span in spans[had : progress.spans])
            stats.add(came, loop.time() - started_s)
        self._failed_at.pop(attempt.path, None)

    def _spans(self, source: Source, fetch: Fetch) -> list[SpanPair]:
        """Layer by layer if somebody wants to hear of layers, else block by block."""
        pairs = list(zip(source.slots, fetch.slots, strict=True))
        if fetch.on_layer is None:
            return [SpanPair(there, here, 0, self._slot_bytes) for there, here in pairs]
        layer_bytes = self._slot_bytes // self._num_layers
        return [
            SpanPair(there, here, layer * layer_bytes, layer_bytes)
            for layer in range(self._num_layers)
            for there, here in pairs
        ]

    def _attempts(self, fetch: Fetch) -> list[_Attempt]:
        """The nearest source first, each by its best transport, then by the next; paths that failed lately come last."""
        now = asyncio.get_running_loop().time()
        self._failed_at = {path: when for path, when in self._failed_at.items() if now - when < self._limits.rest_s}
        near = sorted(fetch.sources, key=lambda source: -self._topology.bytes_s(self._node, source.peer.node))
        attempts = [_Attempt(source, t) for source in near for t in self._transports if t.reaches(source.peer)]
        return sorted(attempts, key=lambda attempt: attempt.path in self._failed_at)


def _after(failed: _Attempt, left: list[_Attempt], failure: TransferError, progress: _Progress) -> list[_Attempt]:
    """What may be tried after a failure: not an arena that is gone; the same path again only after all others."""
    match failure.cause:
        case "out_of_range":
            return []
        case "stale_arena":
            left = [attempt for attempt in left if attempt.source is not failed.source]
        case _:
            left = [*left, failed]
    if progress.told_layers:
        return [attempt for attempt in left if attempt.source is progress.source]
    return left
