"""What travels between an instance and its node's pool process: pool events in an envelope, and their answers."""

from __future__ import annotations

from kvasir.cluster.messages import BlocksChanged, HelloPool, Message, PoolReport, Shutdown
from kvasir.core.pool_events import (
    AdoptLease,
    LeaseBlocks,
    Leased,
    OfferLease,
    OwnerJoined,
    OwnerLost,
    PutEnd,
    PutRevoke,
    PutStart,
    Refused,
    ReleaseLease,
    Reserved,
)
from kvasir.store.arena import ArenaHandle

OwnerEvent = OwnerJoined | PutStart | PutEnd | PutRevoke | LeaseBlocks | ReleaseLease | OfferLease | AdoptLease
"""What an instance may ask. That an owner is lost is for the hub to say."""

OwnerAnswer = Reserved | Leased | Refused


class PoolCall(Message, frozen=True):
    """An event from an instance. Without an `id` it is answered only when it is refused."""

    event: OwnerEvent
    id: int | None = None


class PoolReply(Message, frozen=True):
    """The answer to call `id`; no answer means that it was done. `arena` comes with the answer to OwnerJoined."""

    id: int | None
    answer: OwnerAnswer | None = None
    arena: ArenaHandle | None = None


class Resync(Message, frozen=True):
    """Hub to pool: I lost track. Answered with HelloPool and the whole inventory, as BlocksChanged counted from 1."""


ToPool = OwnerLost | ReleaseLease | Resync | Shutdown
"""What the hub tells a pool: an instance died, an offer is withdrawn, start over, stop."""

FromPool = HelloPool | BlocksChanged | PoolReport
