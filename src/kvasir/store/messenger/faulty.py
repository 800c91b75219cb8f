"""A transport that fails as networks do, by a seeded plan: what the callers of transports are tested with."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass

from kvasir.core.errors import TransferError
from kvasir.store.arena import Arena
from kvasir.store.messenger.spans import SpanPair
from kvasir.store.messenger.transport import PeerArena, Priority, Transport


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The chance of each fault per read; at most one happens to a read. All of them together at most 1.

    `drop`: nothing comes, until the deadline. `delay`: it comes `delay_s` later. `duplicate`: it comes twice. `stall`: some of
    it comes, then nothing, until the deadline. `cut`: some of it comes, then an error. `corrupt_length`: the same with a peer
    that says a length that cannot be.
    """

    drop: float = 0.0
    delay: float = 0.0
    duplicate: float = 0.0
    stall: float = 0.0
    cut: float = 0.0
    corrupt_length: float = 0.0


class FaultyTransport:
    """Wraps `inner`. Where a read fails, garbage is written into the local spans that did not come: nobody may use them."""

    def __init__(self, inner: Transport, arena: Arena, plan: FaultPlan, *, seed: int, delay_s: float = 0.01):
        self.happened: Counter[str] = Counter()
        self._inner = inner
        self._arena = arena
        self._chances = asdict(plan)
        self._rng = random.Random(seed)
        self._delay_s = delay_s

    @property
    def name(self) -> str:
        return self._inner.name

    def reaches(self, peer: PeerArena) -> bool:
        return self._inner.reaches(peer)

    async def read(
        self,
        peer: PeerArena,
        spans: Sequence[SpanPair],
        *,
        deadline_s: float,
        priority: Priority = Priority.FETCH,
        on_part: Callable[[int], None] | None = None,
    ) -> None:
        """See Transport."""

        async def read(some: Sequence[SpanPair], tell: Callable[[int], None] | None = on_part) -> None:
            await self._inner.read(peer, some, deadline_s=deadline_s, priority=priority, on_part=tell)

        fault = self._draw()
        match fault:
            case None:
                await read(spans)
            case "delay":
                await self._wait(self._delay_s, deadline_s)
                await read(spans)
            case "duplicate":
                await read(spans, None)
                await read(spans)
            case _:
                await self._fail(fault, spans, read, deadline_s)

    async def close(self) -> None:
        await self._inner.close()

    def _draw(self) -> str | None:
        number = self._rng.random()
        for fault, chance in self._chances.items():
            if number < chance:
                self.happened[fault] += 1
                return fault
            number -= chance
        return None

    async def _fail(
        self, fault: str, spans: Sequence[SpanPair], read: Callable[[Sequence[SpanPair]], Awaitable[None]], deadline_s: float
    ) -> None:
        come = 0 if fault == "drop" else self._rng.randrange(len(spans) + 1)
        if come:
            await read(spans[:come])
        for span in spans[come:]:
            start = span.local_slot * self._arena.stride + span.offset
            self._arena.memory[start : start + span.length] = self._rng.randrange(256)
        if fault in ("drop", "stall"):
            await self._wait(float("inf"), deadline_s)
        raise TransferError(f"fault {fault}", cause="garbled" if fault == "corrupt_length" else "cut")

    async def _wait(self, seconds: float, deadline_s: float) -> None:
        left_s = deadline_s - asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, min(seconds, left_s)))
        if seconds >= left_s:
            raise TransferError("fault: nothing came until the deadline", cause="stalled")
