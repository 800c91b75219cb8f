"""What a node's pool is asked and what it answers: the events and commands of `PoolNode`, which are also its wire messages.

An *owner* is one incarnation of a process that uses the pool: a name and an epoch. A *slot* is one block's place in the
arena. A slot is, at any time, exactly one of: free; reserved by an owner; private to a lease; published under a key.
A *lease* is an ordered list of slots that one request reads (published) or fills (private): slot i holds block i.
"""

from __future__ import annotations

from msgspec import Struct

from kvasir.core.keys import BlockKey


class PoolEvent(Struct, frozen=True, tag=True):
    """Something asked of the pool by an owner."""

    owner: str
    epoch: int


class OwnerJoined(PoolEvent, frozen=True):
    """A new incarnation; what an earlier epoch of the same owner held is freed."""


class OwnerLost(PoolEvent, frozen=True):
    """The owner died: its reservations and leases are released, except leases on offer to another owner."""


class PutStart(PoolEvent, frozen=True):
    """Reserve up to `count` slots, evicting as needed; answered by Reserved, maybe with fewer."""

    count: int


class KeyedSlot(Struct, frozen=True):
    key: BlockKey
    slot: int


class PutEnd(PoolEvent, frozen=True):
    """Publish these filled slots under their keys; reserved ones are appended to the lease, in order, first.

    A slot that is private to the lease already (an adopted tail) is published where it stands. A key that is published
    already keeps its first slot; the newcomer stays private to the lease, which pins the first one as well.
    """

    lease: str
    blocks: tuple[KeyedSlot, ...]


class PutRevoke(PoolEvent, frozen=True):
    """Give reserved slots back, unused."""

    slots: tuple[int, ...]


class LeaseBlocks(PoolEvent, frozen=True):
    """Open a lease over the longest published prefix of `keys`; answered by Leased."""

    lease: str
    keys: tuple[BlockKey, ...]


class ReleaseLease(PoolEvent, frozen=True):
    """Close the lease; its private slots, and `slots` if the owner reserved them, become free.

    Unknown leases are ignored: releasing is idempotent. A lease on offer may be closed by any owner (a withdrawn hand-off).
    """

    lease: str
    slots: tuple[int, ...] = ()


class OfferLease(PoolEvent, frozen=True):
    """Hand-off, giver's side: append the reserved `slots` (the tail) and let any owner adopt the lease until `deadline_s`."""

    lease: str
    slots: tuple[int, ...]
    deadline_s: float


class AdoptLease(PoolEvent, frozen=True):
    """Hand-off, taker's side; answered by Leased with all slots, in order, or Refused."""

    lease: str


class PoolTick(PoolEvent, frozen=True):
    """Time passed: expire offers whose deadline is over."""


class PoolAnswer(Struct, frozen=True, tag=True):
    """What the pool says back, to the owner that asked."""


class Reserved(PoolAnswer, frozen=True):
    slots: tuple[int, ...]


class Leased(PoolAnswer, frozen=True):
    lease: str
    slots: tuple[int, ...]


class Refused(PoolAnswer, frozen=True):
    """Nothing was changed. `code` is `stale_epoch`, `unknown_lease`, `lease_exists` or `bad_slot`; `message` one line."""

    code: str
    message: str


class Stored(PoolAnswer, frozen=True):
    """To whoever keeps a directory: these blocks can be read here now."""

    keys: tuple[BlockKey, ...]


class Removed(PoolAnswer, frozen=True):
    """To whoever keeps a directory: these blocks are gone. `reason` is `evicted` or `cleared`."""

    keys: tuple[BlockKey, ...]
    reason: str


class PoolStats(Struct, frozen=True):
    """Counts since the start, and the state now, in slots."""

    slots: int = 0
    free: int = 0
    reserved: int = 0
    private: int = 0
    published: int = 0
    leased: int = 0
    leases: int = 0
    owners: int = 0
    lookups: int = 0
    hits: int = 0
    evictions: int = 0
    duplicates: int = 0
    expired_offers: int = 0
    refusals: int = 0
    broken_invariants: int = 0
