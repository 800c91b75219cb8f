"""An instance's hand on its node's pool: reserve slots, publish and lease blocks, hand leases off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import msgspec
import structlog

from kvasir.cluster.messages import PrefixPlan
from kvasir.cluster.pool_host import PoolHost
from kvasir.cluster.pool_messages import BodyEvent, BringBlocks, OwnerAnswer, OwnerEvent, PoolCall, PoolReply, ReceiveLease
from kvasir.cluster.wire import Channel, ZmqChannel
from kvasir.core.errors import ClusterError, DeadlineExceeded, PoolError, StaleEpoch, UnknownLease
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import (
    AdoptLease,
    KeyedSlot,
    LeaseBlocks,
    Leased,
    OfferLease,
    OwnerJoined,
    PutEnd,
    PutRevoke,
    PutStart,
    Refused,
    ReleaseLease,
    Reserved,
)
from kvasir.engine.interface import Slots
from kvasir.store.arena import Arena, open_arena

RECEIVE_S = 30.0
"""How long a hand-off from another node may take; its giver offers it for as long."""

CALL_TIMEOUT_S = 5.0
"""The pool answers within a millisecond; a pool that is silent for so long is gone."""


class Pool(Protocol):
    """The pool as an instance sees it. A call that waits raises PoolError when it is refused, DeadlineExceeded when it is
    not answered in time; a call that fails or is cancelled holds nothing. What does not wait is done in order.
    """

    async def join(self) -> Slots:
        """Introduce this incarnation, which frees what an earlier one held, and map the arena."""
        ...

    async def reserve(self, count: int) -> tuple[int, ...]:
        """Up to `count` slots."""
        ...

    async def lease(self, lease: str, keys: Sequence[BlockKey], *, tenant: str = "") -> tuple[int, ...]:
        """Lease the longest prefix of `keys` that is here; its slots in order. What is put under the lease is `tenant`'s."""
        ...

    async def offer(self, lease: str, slots: Sequence[int], ttl_s: float) -> None:
        """Append the reserved `slots` and let any instance adopt the lease for `ttl_s` from now."""
        ...

    async def bring(self, lease: str, keys: Sequence[BlockKey], plan: PrefixPlan, *, tenant: str = "") -> tuple[int, ...]:
        """As `lease`, after the planned prefix was brought from the SSD or from another node, or its time is over."""
        ...

    async def adopt(self, lease: str) -> tuple[int, ...]:
        """Take over a lease on offer; all its slots in order."""
        ...

    async def receive(
        self, lease: str, keys: Sequence[BlockKey], count: int, source: str, *, tenant: str = ""
    ) -> tuple[int, ...]:
        """As `adopt`, of a lease of `count` blocks that is on offer on another node; `keys` name the full ones."""
        ...

    def put_end(self, lease: str, blocks: Sequence[KeyedSlot]) -> None: ...

    def release(self, lease: str, slots: Sequence[int] = ()) -> None: ...

    def revoke(self, slots: Sequence[int]) -> None: ...


class PoolCaller:
    """Implements `Pool` over anything that carries an event to the pool and brings the answer back."""

    def __init__(self, owner: str, epoch: int, link: Link, clock: Callable[[], float]):
        self._owner = owner
        self._epoch = epoch
        self._link = link
        self._clock = clock

    async def join(self) -> Slots:
        arena = await self._link.join(OwnerJoined(self._owner, self._epoch))
        return attach_slots(arena)

    async def reserve(self, count: int) -> tuple[int, ...]:
        answer = await self._link.call(PutStart(self._owner, self._epoch, count), self._undo_reserve)
        assert isinstance(answer, Reserved), answer
        return answer.slots

    async def lease(self, lease: str, keys: Sequence[BlockKey], *, tenant: str = "") -> tuple[int, ...]:
        return await self.open(LeaseBlocks(self._owner, self._epoch, lease, tuple(keys), tenant))

    async def bring(self, lease: str, keys: Sequence[BlockKey], plan: PrefixPlan, *, tenant: str = "") -> tuple[int, ...]:
        event = BringBlocks(
            owner=self._owner,
            epoch=self._epoch,
            lease=lease,
            keys=tuple(keys),
            blocks=plan.blocks,
            sources=plan.sources,
            within_s=plan.within_s,
            hidden_s=plan.hidden_s,
            tenant=tenant,
        )
        return await self.open(event, plan.within_s)

    async def adopt(self, lease: str) -> tuple[int, ...]:
        return await self.open(AdoptLease(self._owner, self._epoch, lease))

    async def receive(
        self, lease: str, keys: Sequence[BlockKey], count: int, source: str, *, tenant: str = ""
    ) -> tuple[int, ...]:
        event = ReceiveLease(self._owner, self._epoch, lease, tuple(keys), count, source, tenant)
        return await self.open(event, RECEIVE_S)

    async def offer(self, lease: str, slots: Sequence[int], ttl_s: float) -> None:
        deadline_s = self._clock() + ttl_s
        await self._link.call(OfferLease(self._owner, self._epoch, lease, tuple(slots), deadline_s))

    def put_end(self, lease: str, blocks: Sequence[KeyedSlot]) -> None:
        self._link.tell(PutEnd(self._owner, self._epoch, lease, tuple(blocks)))

    def release(self, lease: str, slots: Sequence[int] = ()) -> None:
        self._link.tell(ReleaseLease(self._owner, self._epoch, lease, tuple(slots)))

    def revoke(self, slots: Sequence[int]) -> None:
        if slots:
            self._link.tell(PutRevoke(self._owner, self._epoch, tuple(slots)))

    async def open(self, event: LeaseBlocks | AdoptLease | BringBlocks | ReceiveLease, extra_s: float = 0.0) -> tuple[int, ...]:
        """A failed call is followed by a release at once: order makes it hit this lease and no later one of its name."""
        try:
            answer = await self._link.call(event, extra_s=extra_s)
        except (DeadlineExceeded, asyncio.CancelledError):
            with contextlib.suppress(ClusterError):
                self.release(event.lease)
            raise
        assert isinstance(answer, Leased), answer
        return answer.slots

    def _undo_reserve(self, answer: OwnerAnswer) -> None:
        if isinstance(answer, Reserved):
            self.revoke(answer.slots)


Undo = Callable[[OwnerAnswer], None]


class Link(Protocol):
    """How events reach the pool."""

    async def join(self, event: OwnerJoined) -> Arena: ...

    async def call(
        self, event: OwnerEvent | BodyEvent, undo: Undo | None = None, *, extra_s: float = 0.0
    ) -> OwnerAnswer | None:
        """The answer. Raises PoolError and DeadlineExceeded; an answer that comes too late is given to `undo`.

        `extra_s` is what the call may take beyond what any call may.
        """
        ...

    def tell(self, event: OwnerEvent) -> None:
        """Without an answer, in order. Raises ClusterError when the pool takes no more."""
        ...


@contextlib.asynccontextmanager
async def open_pool(address: str, owner: str, epoch: int, *, timeout_s: float = CALL_TIMEOUT_S) -> AsyncIterator[Pool]:
    """The pool whose process listens at `address`."""
    channel: ZmqChannel[PoolReply, PoolCall] = ZmqChannel(address, owner, msgspec.msgpack.Decoder(PoolReply))
    try:
        async with connect_pool(channel, owner, epoch, timeout_s=timeout_s) as pool:
            yield pool
    finally:
        channel.close()


@contextlib.asynccontextmanager
async def connect_pool(
    channel: Channel[PoolReply, PoolCall], owner: str, epoch: int, *, timeout_s: float = CALL_TIMEOUT_S
) -> AsyncIterator[Pool]:
    """The pool at the other end of a channel."""
    link = ChannelLink(channel, timeout_s)
    async with asyncio.TaskGroup() as tasks:
        reader = tasks.create_task(link.read())
        try:
            yield PoolCaller(owner, epoch, link, asyncio.get_running_loop().time)
        finally:
            reader.cancel()


def local_pool(host: PoolHost, owner: str, epoch: int, clock: Callable[[], float]) -> Pool:
    """A pool in the same process."""
    return PoolCaller(owner, epoch, _LocalLink(host), clock)


def attach_slots(arena: Arena) -> Slots:
    """The arena as an engine wants it."""
    return Slots(arena.memory, arena.stride, arena.generations, arena.missing)


class _LocalLink:
    def __init__(self, host: PoolHost):
        self._host = host

    async def join(self, event: OwnerJoined) -> Arena:
        _checked(self._host.ask(event))
        return self._host.arena

    async def call(
        self, event: OwnerEvent | BodyEvent, undo: Undo | None = None, *, extra_s: float = 0.0
    ) -> OwnerAnswer | None:
        return _checked(self._host.ask(_at_once(event)))

    def tell(self, event: OwnerEvent) -> None:
        self._host.handle(event)


class ChannelLink:
    def __init__(self, channel: Channel[PoolReply, PoolCall], timeout_s: float):
        self._channel = channel
        self._timeout_s = timeout_s
        self._next_id = 0
        self._waiting: dict[int, asyncio.Future[PoolReply]] = {}
        self._undo: dict[int, Undo] = {}  # for answers that nobody takes any more
        self._log = structlog.get_logger().bind(part="pool client")

    async def read(self) -> None:
        """Give answers to those who wait for them; run it while the link is used."""
        while True:
            reply = await self._channel.recv()
            if reply.id is None:
                self._log.warning("the pool refused what did not wait for an answer", answer=reply.answer)
            elif (waiter := self._waiting.get(reply.id)) is not None and not waiter.done():
                waiter.set_result(reply)
            else:
                self._take_back(reply.id, reply)

    def _take_back(self, call_id: int, reply: PoolReply) -> None:
        """Undo what the pool did for a call that nobody waits for any more."""
        undo = self._undo.pop(call_id, None)
        if undo is not None and reply.answer is not None:
            undo(reply.answer)

    async def join(self, event: OwnerJoined) -> Arena:
        reply = await self._ask(event, None)
        assert reply.arena is not None, "the pool answers a join with its arena"
        return open_arena(reply.arena)

    async def call(
        self, event: OwnerEvent | BodyEvent, undo: Undo | None = None, *, extra_s: float = 0.0
    ) -> OwnerAnswer | None:
        return (await self._ask(event, undo, extra_s)).answer

    def tell(self, event: OwnerEvent) -> None:
        if not self._channel.send(PoolCall(event)):
            raise ClusterError(f"the pool takes no more messages: {type(event).__name__} was not sent")

    async def _ask(self, event: OwnerEvent | BodyEvent, undo: Undo | None, extra_s: float = 0.0) -> PoolReply:
        self._next_id += 1
        call_id = self._next_id
        waiter: asyncio.Future[PoolReply] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = waiter
        if not self._channel.send(PoolCall(event, call_id)):
            del self._waiting[call_id]
            raise ClusterError(f"the pool takes no more messages: {type(event).__name__} was not sent")
        if undo is not None:
            self._undo[call_id] = undo
        try:
            async with asyncio.timeout(self._timeout_s + extra_s):
                reply = await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():  # it came in the very turn in which the wait ended
                self._take_back(call_id, waiter.result())
            if isinstance(error, TimeoutError):
                what = type(event).__name__
                raise DeadlineExceeded(f"the pool did not answer {what} within {self._timeout_s + extra_s:g} s") from None
            raise
        finally:
            del self._waiting[call_id]
        self._undo.pop(call_id, None)
        _checked(reply.answer)
        return reply


def _at_once(event: OwnerEvent | BodyEvent) -> OwnerEvent:
    """A pool without a body brings nothing: the same call over what is there."""
    match event:
        case BringBlocks():
            return LeaseBlocks(event.owner, event.epoch, event.lease, event.keys, event.tenant)
        case ReceiveLease():
            return AdoptLease(event.owner, event.epoch, event.lease)
        case _:
            return event


def _checked(answer: OwnerAnswer | None) -> OwnerAnswer | None:
    if not isinstance(answer, Refused):
        return answer
    error = {"stale_epoch": StaleEpoch, "unknown_lease": UnknownLease}.get(answer.code, PoolError)
    raise error(answer.message)
