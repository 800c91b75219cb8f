"""What a node's pool is asked and what it answers: the events and commands of `PoolNode`, which are also its wire messages.

An *owner* is one incarnation of a process that uses the pool: a name and an epoch. A *slot* is one block's place in the
arena. A slot is, at any time, exactly one of: free; reserved by an owner; private to a lease; published under a key; being
filled from the SSD (loading) or from another node (fetching); or, with an SSD, written out after its block was evicted. A
*lease* is an ordered list of slots that one request reads (published) or fills (private): slot i holds block i. An *ssd slot*
is one block's place on the SSD.

The SSD is written and read by the pool's own body, other nodes' blocks are fetched by its messenger. They say SpillDone,
LoadDone and FetchDone in their own name whatever the outcome: each Spill, Loading and Fetching gets exactly one, once nothing
can arrive any more. Until then the node gives neither the slot nor the ssd slot to anybody else, not even when the owner that
asked for it has died, because a late byte would overwrite another's block.
"""

from __future__ import annotations

from enum import IntEnum

from msgspec import Struct

from kvasir.core.keys import BlockKey
from kvasir.core.tier import Tier


class PoolEvent(Struct, frozen=True, tag=True, gc=False):
    """Something asked of the pool by an owner."""

    owner: str
    epoch: int


class OwnerJoined(PoolEvent, frozen=True):
    """A new incarnation; what an earlier epoch of the same owner held is freed."""


class OwnerLost(PoolEvent, frozen=True):
    """The owner died: its reservations and leases are released, except leases on offer to another owner."""


class PutStart(PoolEvent, frozen=True):
    """Reserve up to `count` slots, evicting as needed; answered by Reserved, maybe with fewer.

    For a `tenant` with a quota, others' blocks go only as far as the quota lets it publish.
    """

    count: int
    tenant: str = ""


class KeyedSlot(Struct, frozen=True, gc=False):
    key: BlockKey
    slot: int


class PutEnd(PoolEvent, frozen=True):
    """Publish these filled slots under their keys; reserved ones are appended to the lease, in order, first.

    A slot that is private to the lease already (an adopted tail) is published where it stands. A key that is published
    already keeps its first slot; the newcomer stays private to the lease, which pins the first one as well. What its tenant's
    quota does not allow to publish stays private too, and so does all that comes after it.
    """

    lease: str
    blocks: tuple[KeyedSlot, ...]


class Insert(PoolEvent, frozen=True):
    """Publish these filled, reserved slots for whoever matches them next: PutEnd without a lease, a sequence in order.

    The slots are the pool's from then on; those of keys that are published already, and those that the `tenant`'s quota does
    not allow, are freed.
    """

    blocks: tuple[KeyedSlot, ...]
    tenant: str = ""


class PutRevoke(PoolEvent, frozen=True):
    """Give reserved slots back, unused."""

    slots: tuple[int, ...]


class LeaseBlocks(PoolEvent, frozen=True):
    """Open a lease over the longest published prefix of `keys`; answered by Leased.

    What is published under the lease counts for `tenant`; that tenants do not hit each other's blocks is up to the keys. Only
    a request's own `is_lookup` counts in `lookups` and `hits`: not what the pool's body opens to bring blocks for it.
    """

    lease: str
    keys: tuple[BlockKey, ...]
    tenant: str = ""
    is_lookup: bool = True


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
    """Time passed: offers whose deadline is over and pins end, and what the SSD has too may make room in DRAM."""


class LoadStart(PoolEvent, frozen=True):
    """Read the blocks `keys`, which follow on those of the lease, from the SSD; answered by Loading, maybe with fewer.

    Evicts as needed. One load or fetch at a time for each lease name, until its LoadDone or FetchDone.
    """

    lease: str
    keys: tuple[BlockKey, ...]


class FetchStart(PoolEvent, frozen=True):
    """Reserve up to `count` slots for blocks of another node that follow on those of the lease; answered by Fetching.

    Evicts as needed. One load or fetch at a time for each lease name, until its LoadDone or FetchDone.
    """

    lease: str
    count: int


class LoadDone(PoolEvent, frozen=True):
    """Said by the pool's body: the reads of the lease's Loading are over, and the slots from the first of the ssd slots
    `failed` on hold nothing. Answered by Loaded if the one that asked still holds the lease; else all slots become free.

    Blocks of `failed` are dropped from the SSD: they were corrupt or could not be read.
    """

    lease: str
    failed: tuple[int, ...] = ()


class FetchDone(PoolEvent, frozen=True):
    """Said by the messenger: no byte of the lease's Fetching can arrive any more, and its first `num_good` slots are filled.

    Answered by Loaded if the one that asked still holds the lease; else all slots become free.
    """

    lease: str
    num_good: int


class DropBlocks(PoolEvent, frozen=True):
    """Forget these blocks in DRAM and on the SSD, except those that are leased or being read; unknown keys are ignored.

    Blocks that came after a forgotten one stay until they are evicted, or until it is published again.
    """

    keys: tuple[BlockKey, ...]


class Clear(PoolEvent, frozen=True):
    """Forget all blocks in DRAM and on the SSD, except those that are leased or being read."""


class Priority(IntEnum):
    """Of two blocks that could go, the one of lower priority goes first."""

    LOW = 0
    NORMAL = 1
    HIGH = 2


class Pin(PoolEvent, frozen=True):
    """Do not evict the longest prefix of `keys`, from a sequence's first on, that is in DRAM; answered by Pinned.

    Not before `until_s` (if that is past, the pin sets the priority only), and after that by `priority`, as long as the blocks
    stay. LOW holds for blocks that only this sequence uses, until another one does. Pins of several sequences through one
    block add up: the longest time, the highest priority. Refused (`pins_full`) when over half of the slots would be pinned.
    """

    keys: tuple[BlockKey, ...]
    until_s: float
    priority: Priority = Priority.NORMAL


class Unpin(PoolEvent, frozen=True):
    """Take back what pins said of these blocks, from the last one to where a longer sequence that is pinned goes on."""

    keys: tuple[BlockKey, ...]


class SetQuota(PoolEvent, frozen=True):
    """At most `slots` published blocks of `tenant` from now on, or any number if None.

    At its quota a tenant's own idle blocks make room for its new ones. What it has too many of goes when it is idle.
    """

    tenant: str
    slots: int | None


class SpillDone(PoolEvent, frozen=True):
    """Said by the pool's body: the write of a Spill is over; the block can be read from the SSD now if it is `ok`."""

    ssd_slot: int
    ok: bool


class SsdBlock(Struct, frozen=True, gc=False):
    """A block on the SSD, `depth` being its number in its sequence."""

    key: BlockKey
    ssd_slot: int
    depth: int


class SsdFound(PoolEvent, frozen=True):
    """Said by the pool's body at its start: what an earlier run left on the SSD, in the order in which it may go."""

    blocks: tuple[SsdBlock, ...]


class PoolAnswer(Struct, frozen=True, tag=True, gc=False):
    """What the pool says back, to the owner that asked."""


class Reserved(PoolAnswer, frozen=True):
    slots: tuple[int, ...]


class Leased(PoolAnswer, frozen=True):
    """`on_ssd` further keys, contiguous after those of `slots`, could be loaded from the SSD."""

    lease: str
    slots: tuple[int, ...]
    on_ssd: int = 0


class Pinned(PoolAnswer, frozen=True):
    """The pin is on this many blocks, the first of those that were named."""

    num_blocks: int


class Loading(PoolAnswer, frozen=True):
    """To the pool's body: read `ssd_slots` into `slots`, each into its own, and say LoadDone. Empty: nothing to say."""

    lease: str
    slots: tuple[int, ...]
    ssd_slots: tuple[int, ...]


class Fetching(PoolAnswer, frozen=True):
    """To the messenger: fill `slots`, in order, and say FetchDone. Empty: nothing could be reserved, nothing to say."""

    lease: str
    slots: tuple[int, ...]


class Loaded(PoolAnswer, frozen=True):
    """A load or fetch is over: these slots hold the first of the blocks and are reserved by the owner, for PutEnd."""

    lease: str
    slots: tuple[int, ...]


class Spill(PoolAnswer, frozen=True):
    """To the pool's body: write the block in `slot` to `ssd_slot` and say SpillDone."""

    key: BlockKey
    slot: int
    ssd_slot: int
    depth: int


class Erase(PoolAnswer, frozen=True):
    """To the pool's body: what lies in these ssd slots must not be found at the next start. Nothing is said when it is done."""

    ssd_slots: tuple[int, ...]


class Refused(PoolAnswer, frozen=True):
    """Nothing was changed. `message` is one line.

    `code` is `stale_epoch`, `unknown_lease`, `lease_exists`, `loading`, `bad_slot`, `bad_quota` or `pins_full`.
    """

    code: str
    message: str


class Stored(PoolAnswer, frozen=True):
    """To whoever keeps a directory: these blocks can be read here, in this tier, now."""

    keys: tuple[BlockKey, ...]
    tier: Tier = Tier.DRAM


class Removed(PoolAnswer, frozen=True):
    """To whoever keeps a directory: these blocks are gone from this tier.

    `reason` is `evicted` (space was needed), `quota` (a tenant had too many), `demoted` (ahead of need; the SSD has it),
    `failed` (could not be read) or `cleared` (on request).
    """

    keys: tuple[BlockKey, ...]
    reason: str
    tier: Tier = Tier.DRAM


class TenantStats(Struct, frozen=True):
    """Blocks of one tenant in DRAM; the empty name is everybody who gave none. Without a `quota` there is no limit."""

    tenant: str
    published: int
    quota: int | None


class PoolStats(Struct, frozen=True):
    """Counts since the start, and the state now, in slots.

    Of the blocks that requests looked up (`lookups`), `hits` were in DRAM, those included that were brought there for them.
    `evictions` of DRAM blocks are counted whatever the reason, `quota_evictions` and `demotions` of them apart. `tenants` are
    those that are named anywhere, by name, once the first one is. `over_quota` counts blocks that stayed private.
    `fetching` slots are being filled from other nodes; `fetched` and `failed_fetches` count blocks.
    Of the SSD: `ssd_published` blocks can be read, `writing` are being written; `spilling` and `loading` are DRAM slots
    that a write (of a block evicted meanwhile) or a read keeps; `spills_waiting` blocks wait to be written. `spilled`,
    `loaded`, `failed_spills`, `failed_loads` and `ssd_evictions` count blocks; `ssd_hits` those that a lookup
    found on the SSD only; `dropped` those that went before they had been written.
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
    fetching: int = 0
    fetched: int = 0
    failed_fetches: int = 0
    pinned: int = 0
    quota_evictions: int = 0
    demotions: int = 0
    over_quota: int = 0
    tenants: tuple[TenantStats, ...] = ()
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
