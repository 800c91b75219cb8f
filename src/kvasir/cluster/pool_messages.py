"""What travels between an instance and its node's pool process: pool events in an envelope, and their answers."""

from __future__ import annotations

from kvasir.cluster.messages import BlocksChanged, HelloPool, Message, OrderDone, PeerPool, PoolReport, Shutdown
from kvasir.cluster.orders import AnyOrder
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import (
    AdoptLease,
    LeaseBlocks,
    Leased,
    OfferLease,
    OwnerJoined,
    OwnerLost,
    PoolEvent,
    PutEnd,
    PutRevoke,
    PutStart,
    Refused,
    ReleaseLease,
    Reserved,
)
from kvasir.store.arena import ArenaHandle
from kvasir.store.messenger.transport import Priority


class BringBlocks(PoolEvent, frozen=True):
    """As LeaseBlocks, after the pool's body has brought the first `blocks` of `keys` to DRAM.

    They come from its SSD, then from the nearest of `sources`, or another of them. What has not come within `within_s` is not
    waited for. The answer may come `hidden_s` early: then slots of the lease are still being written, layer by layer (see
    engine/landing.py), and it is open when their last layer has come.
    """

    lease: str
    keys: tuple[BlockKey, ...]
    blocks: int
    sources: tuple[str, ...]
    within_s: float
    hidden_s: float = 0.0
    tenant: str = ""


class ReceiveLease(PoolEvent, frozen=True):
    """As AdoptLease, of a lease of `count` blocks that is on offer on node `source`; `keys` name the full ones."""

    lease: str
    keys: tuple[BlockKey, ...]
    count: int
    source: str
    tenant: str = ""


OwnerEvent = OwnerJoined | PutStart | PutEnd | PutRevoke | LeaseBlocks | ReleaseLease | OfferLease | AdoptLease
"""What the brain answers to an instance, or to another node's pool. That an owner is lost is for the hub to say."""

BodyEvent = BringBlocks | ReceiveLease
"""What takes the pool's body time."""

OwnerAnswer = Reserved | Leased | Refused


class PoolCall(Message, frozen=True):
    """An event from an instance. Without an `id` it is answered only when it is refused."""

    event: OwnerEvent | BodyEvent
    id: int | None = None


class PoolReply(Message, frozen=True):
    """The answer to call `id`; no answer means that it was done. `arena` comes with the answer to OwnerJoined."""

    id: int | None
    answer: OwnerAnswer | None = None
    arena: ArenaHandle | None = None


class Resync(Message, frozen=True):
    """Hub to pool: I lost track. Answered with HelloPool and the whole inventory, as BlocksChanged counted from 1."""


class PeersChanged(Message, frozen=True):
    """Hub to pool: all other nodes whose pools can be reached, now."""

    peers: tuple[PeerPool, ...]


class CopyBlocks(Message, frozen=True):
    """Hub to pool: fetch these blocks, a prefix in order, from node `source`; best effort. They count for `tenant`."""

    source: str
    keys: tuple[BlockKey, ...]
    priority: Priority = Priority.REPLICATION
    tenant: str = ""


ToPool = OwnerLost | ReleaseLease | Resync | PeersChanged | CopyBlocks | AnyOrder | Shutdown
"""What the hub tells a pool: an owner died, an offer is withdrawn, start over, who else is there, copy, do as ordered, stop."""

FromPool = HelloPool | BlocksChanged | PoolReport | OrderDone
