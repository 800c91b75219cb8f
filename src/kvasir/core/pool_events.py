"""What a node's pool is asked and what it answers: the events and commands of `PoolNode`, which are also its wire messages.

An *owner* is one incarnation of a process that uses the pool: a name and an epoch. A *slot* is one block's place in the
arena. A slot is, at any time, exactly one of: free; reserved by an owner; private to a lease; published under a key; or,
with an SSD, being read into (loading) or written out after its block was evicted. A *lease* is an ordered list of slots that
one request reads (published) or fills (private): slot i holds block i. An *ssd slot* is one block's place on the SSD.

The SSD is written and read by the pool's own body, which says SpillDone and LoadDone in its own name whatever the outcome: each
Spill and each Loading gets exactly one. Until then the node gives neither the slot nor the ssd slot to anybody else, not
even when the owner that asked for it has died, because a late read would overwrite another's block.
"""

from __future__ import annotations

from msgspec import Struct

from kvasir.core.keys import BlockKey
from kvasir.core.tier import Tier


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


class PutBlocks(PoolEvent, frozen=True):
    """PutStart and PutEnd in one, for blocks whose content is in place as soon as they have a slot, as in a simulation.

    Answered by Reserved, maybe with fewer slots than there are `keys`: the first of them are published under the lease.
    """

    lease: str
    keys: tuple[BlockKey, ...]


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


class LoadStart(PoolEvent, frozen=True):
    """Read the blocks `keys`, which follow on those of the lease, from the SSD; answered by Loading, maybe with fewer.

    Evicts as needed. One load at a time for each lease name, until its LoadDone.
    """

    lease: str
    keys: tuple[BlockKey, ...]


class LoadDone(PoolEvent, frozen=True):
    """Said by the pool's body: the reads of the lease's Loading are over, and the slots from the first of the ssd slots
    `failed` on hold nothing. Answered by Loaded if the one that asked still holds the lease; else all slots become free.

    Blocks of `failed` are dropped from the SSD: they were corrupt or could not be read.
    """

    lease: str
    failed: tuple[int, ...] = ()


class SpillDone(PoolEvent, frozen=True):
    """Said by the pool's body: the write of a Spill is over; the block can be read from the SSD now if it is `ok`."""

    ssd_slot: int
    ok: bool


class SsdBlock(Struct, frozen=True):
    """A block on the SSD, `depth` being its number in its sequence."""

    key: BlockKey
    ssd_slot: int
    depth: int


class SsdFound(PoolEvent, frozen=True):
    """Said by the pool's body at its start: what an earlier run left on the SSD, in the order in which it may go."""

    blocks: tuple[SsdBlock, ...]


class PoolAnswer(Struct, frozen=True, tag=True):
    """What the pool says back, to the owner that asked."""


class Reserved(PoolAnswer, frozen=True):
    slots: tuple[int, ...]


class Leased(PoolAnswer, frozen=True):
    """`on_ssd` further keys, contiguous after those of `slots`, could be loaded from the SSD."""

    lease: str
    slots: tuple[int, ...]
    on_ssd: int = 0


class Loading(PoolAnswer, frozen=True):
    """To the pool's body: read `ssd_slots` into `slots`, each into its own, and say LoadDone. Empty: nothing to say."""

    lease: str
    slots: tuple[int, ...]
    ssd_slots: tuple[int, ...]


class Loaded(PoolAnswer, frozen=True):
    """These slots hold the first blocks that were asked for and are reserved by the owner, to be published with PutEnd."""

    lease: str
    slots: tuple[int, ...]


class Spill(PoolAnswer, frozen=True):
    """To the pool's body: write the block in `slot` to `ssd_slot` and say SpillDone."""

    key: BlockKey
    slot: int
    ssd_slot: int
    depth: int


class Refused(PoolAnswer, frozen=True):
    """Nothing was changed. `message` is one line.

    `code` is `stale_epoch`, `unknown_lease`, `lease_exists`, `loading` or `bad_slot`.
    """

    code: str
    message: str


class Stored(PoolAnswer, frozen=True):
    """To whoever keeps a directory: these blocks can be read here, in this tier, now."""

    keys: tuple[BlockKey, ...]
    tier: Tier = Tier.DRAM


class Removed(PoolAnswer, frozen=True):
    """To whoever keeps a directory: these blocks are gone from this tier. `reason` is `evicted`, `failed` or `cleared`."""

    keys: tuple[BlockKey, ...]
    reason: str
    tier: Tier = Tier.DRAM


class PoolStats(Struct, frozen=True):
    """Counts since the start, and the state now, in slots.

    Of the SSD: `ssd_published` blocks can be read, `writing` are being written; `spilling` and `loading` are DRAM slots
    that a write (of a block evicted meanwhile) or a read keeps; `spills_waiting` blocks wait to be written. `spilled`,
    `loaded`, `failed_spills`, `failed_loads` and `ssd_evictions` count blocks; `ssd_hits` those that a lease found on the
    SSD only; `dropped` those that went before they had been written.
    """

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
    ssd_slots: int = 0
    ssd_free: int = 0
    ssd_published: int = 0
    writing: int = 0
    spilling: int = 0
    spills_waiting: int = 0
    loading: int = 0
    spilled: int = 0
    failed_spills: int = 0
    dropped: int = 0
    loaded: int = 0
    failed_loads: int = 0
    ssd_hits: int = 0
    ssd_evictions: int = 0
