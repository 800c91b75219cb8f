"""The brain of one node's pool: which slot holds which block, who reserved, fills or reads it, and what is evicted.

    free ──PutStart──▶ reserved ──PutEnd──▶ published ──(no lease, space needed)──▶ free
                          │  └─OfferLease─▶ private ──PutEnd──▶ published
                          └──PutRevoke, owner died──▶ free

Insert is PutEnd without a lease, `put_blocks` is PutStart and PutEnd in one. Blocks of another node: free ──FetchStart──▶
fetching ──FetchDone──▶ reserved. With an SSD (pool/ssd.py), likewise: free ──LoadStart──▶ loading ──LoadDone──▶ reserved, and
a published slot that is evicted while a Spill reads it is free only at its SpillDone.

Everything is validated before anything is changed, so a Refused event leaves no trace. Blocks are released deepest first, and
a lease pins every published block of its sequence, so an evictor that honours the order never strands a suffix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, assert_never

from msgspec.structs import replace
from mypy_extensions import mypyc_attr

from kvasir.core.errors import InvariantError
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import (
    AdoptLease,
    Clear,
    DropBlocks,
    Erase,
    FetchDone,
    Fetching,
    FetchStart,
    Insert,
    KeyedSlot,
    LeaseBlocks,
    Leased,
    LoadDone,
    Loaded,
    Loading,
    LoadStart,
    OfferLease,
    OwnerJoined,
    OwnerLost,
    Pin,
    Pinned,
    PoolAnswer,
    PoolEvent,
    PoolStats,
    PoolTick,
    PutEnd,
    PutRevoke,
    PutStart,
    Refused,
    ReleaseLease,
    Removed,
    Reserved,
    SetQuota,
    SpillDone,
    SsdFound,
    Stored,
    Unpin,
)
from kvasir.core.tier import Tier
from kvasir.pool.eviction import Block, Eviction, Lru
from kvasir.pool.leases import Lease, Load, Owner, ledger_problems
from kvasir.pool.retention import Retention
from kvasir.pool.slots import SlotTable
from kvasir.pool.ssd import SsdTier
from kvasir.pool.story import STORY_LENGTH, Story

MAX_SPILLING = 32
"""Blocks on their way to the SSD at a time: with blocks of some MiB, enough to keep it busy and little to hold back."""

Code = Literal["stale_epoch", "unknown_lease", "lease_exists", "loading", "bad_slot", "bad_quota", "pins_full"]


@dataclass(slots=True)
class Counters:
    """What happened since the start; the fields of the same names in PoolStats."""

    lookups: int = 0
    hits: int = 0
    duplicates: int = 0
    expired_offers: int = 0
    fetched: int = 0
    failed_fetches: int = 0
    over_quota: int = 0
    refusals: int = 0
    evictions: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@mypyc_attr(acyclic=True)
class Put:
    """The first of some blocks are under a lease now, in these `slots`. To others is to be said, in this order, `before`, that
    those under the keys `stored` can be read, and `after`.
    """

    __slots__ = ("after", "before", "slots", "stored")

    def __init__(self, slots: tuple[int, ...], before: list[PoolAnswer], stored: tuple[BlockKey, ...] = ()):
        self.slots = slots
        self.before = before
        self.stored = stored
        self.after: list[PoolAnswer] = []


class PoolNode:
    """Takes events of core/pool_events.py and answers. Without `ssd_slots` there is no SSD. The last `story_length` events are
    told with a broken invariant.

    With `low_free`, a PoolTick that finds fewer slots free evicts up to `high_free` ahead of need, if the SSD has them too.
    """

    def __init__(
        self,
        num_slots: int,
        eviction: Eviction | None = None,
        *,
        ssd_slots: int = 0,
        ssd_eviction: Eviction | None = None,
        max_spilling: int = MAX_SPILLING,
        low_free: int = 0,
        high_free: int = 0,
        story_length: int = STORY_LENGTH,
    ):
        self.num_slots = num_slots
        self._slots = SlotTable(num_slots, eviction if eviction is not None else Lru())
        self._ssd: SsdTier | None = None
        if ssd_slots:
            order = ssd_eviction if ssd_eviction is not None else Lru()
            self._ssd = SsdTier(ssd_slots, order, self._slots, max_spilling=max_spilling)
        self._loads: dict[str, Load] = {}
        self._owners: dict[str, Owner] = {}
        self._leases: dict[str, Lease] = {}
        self._offers: dict[str, None] = {}
        self._story = Story(story_length)
        self._counters = Counters()
        self._low_free, self._high_free = low_free, max(low_free, high_free)
        self._retention: Retention | None = None
        if low_free:
            self._retain()

    def handle(self, event: PoolEvent, now: float) -> list[PoolAnswer]:
        """Answers to the owner that asked, Stored and Removed to whoever keeps a directory, the rest to the body."""
        self._story.tell(now, event)
        return self._with_room(self._answer(event, now), now)

    # What a simulation says most often can be said without a message, too.

    def lease_blocks(self, name: str, epoch: int, lease_id: str, keys: tuple[BlockKey, ...], now: float) -> list[PoolAnswer]:
        self._story.tell(now, ("lease", name, epoch, lease_id, keys))
        owner = self._living(name, epoch)
        answers = self._stale(name, epoch) if owner is None else self._lease(owner, lease_id, keys, "", True, now)
        return self._with_room(answers, now)

    def put_blocks(self, name: str, epoch: int, lease_id: str, keys: tuple[BlockKey, ...], now: float) -> Put:
        """PutStart and PutEnd in one, for blocks whose content is in place as soon as they have a slot."""
        self._story.tell(now, ("put", name, epoch, lease_id, keys))
        owner = self._living(name, epoch)
        put = Put((), self._stale(name, epoch)) if owner is None else self._put(owner, lease_id, keys, now)
        put.after = self._with_room([], now)
        return put

    def offer_lease(
        self, name: str, epoch: int, lease_id: str, slots: tuple[int, ...], deadline_s: float, now: float
    ) -> list[PoolAnswer]:
        self._story.tell(now, ("offer", name, epoch, lease_id, slots))
        owner = self._living(name, epoch)
        answers = self._stale(name, epoch) if owner is None else self._offer(owner, lease_id, slots, deadline_s)
        return self._with_room(answers, now)

    def release_lease(self, name: str, epoch: int, lease_id: str, slots: tuple[int, ...], now: float) -> list[PoolAnswer]:
        self._story.tell(now, ("release", name, epoch, lease_id, slots))
        owner = self._living(name, epoch)
        answers = self._stale(name, epoch) if owner is None else self._release(owner, lease_id, slots, now)
        return self._with_room(answers, now)

    def _with_room(self, answers: list[PoolAnswer], now: float) -> list[PoolAnswer]:
        """And what goes, and is written to the SSD, after whatever happened."""
        if self._retention is not None:
            answers += self._evicted(self._retention.trim(now), "quota", now)
        return answers if self._ssd is None else answers + self._spill(self._ssd, now)

    def _answer(self, event: PoolEvent, now: float) -> list[PoolAnswer]:
        of_owner = _OF_OWNERS.get(type(event))
        if of_owner is None:
            return self._answer_any(event, now)
        name, epoch = event.owner, event.epoch
        owner = self._living(name, epoch)
        return self._stale(name, epoch) if owner is None else of_owner(self, owner, event, now)

    def _living(self, name: str, epoch: int) -> Owner | None:
        owner = self._owners.get(name)
        return owner if owner is not None and owner.epoch == epoch and owner.alive else None

    def _stale(self, name: str, epoch: int) -> list[PoolAnswer]:
        return self._refuse("stale_epoch", f"{name} epoch {epoch} is not here; {_incarnation(self._owners.get(name))}")

    def _answer_any(self, event: PoolEvent, now: float) -> list[PoolAnswer]:
        """What does not need a living owner."""
        match event:
            case PoolTick():
                return self._tick(now)
            case SpillDone():
                return self._end_spill(event, now)
            case LoadDone():
                return self._end_load(event, now)
            case FetchDone():
                return self._end_fetch(event)
            case SsdFound():
                return self._find(event, now)
            case OwnerJoined(owner=name, epoch=epoch):
                return self._join(name, epoch, now)
            case OwnerLost(owner=name, epoch=epoch):
                return self._lose(name, epoch, now)
        raise TypeError(f"not a pool event: {event!r}")

    @property
    def num_blocks(self) -> int:
        """Blocks that can be read in DRAM."""
        return len(self._slots.index)

    def inventory(self, tier: Tier = Tier.DRAM) -> tuple[BlockKey, ...]:
        """The keys of all blocks that can be read in a tier, oldest first."""
        match tier:
            case Tier.DRAM:
                return tuple(self._slots.index)
            case Tier.SSD:
                return tuple(self._ssd.index) if self._ssd is not None else ()
            case _:
                assert_never(tier)

    def stats(self) -> PoolStats:
        counters = self._counters
        stats = PoolStats(
            slots=self.num_slots,
            free=len(self._slots.free),
            reserved=sum(len(owner.reserved) for owner in self._owners.values()),
            private=sum(len(lease.private) for lease in self._leases.values()),
            published=len(self._slots.index),
            leased=self._slots.num_pinned,
            leases=len(self._leases),
            owners=sum(owner.alive for owner in self._owners.values()),
            lookups=counters.lookups,
            hits=counters.hits,
            evictions=sum(counters.evictions.values()),
            duplicates=counters.duplicates,
            expired_offers=counters.expired_offers,
            fetching=sum(len(load.slots) for load in self._loads.values() if load.ssd_slots is None),
            fetched=counters.fetched,
            failed_fetches=counters.failed_fetches,
            quota_evictions=counters.evictions["quota"],
            demotions=counters.evictions["demoted"],
            over_quota=counters.over_quota,
            refusals=counters.refusals,
        )
        if self._retention is not None:
            stats = replace(stats, pinned=self._retention.pins.num_pinned, tenants=self._retention.quotas.stats())
        return stats if self._ssd is None else self._with_ssd(stats, self._ssd)

    def check(self) -> None:
        """Verify every invariant both ways. Raises InvariantError with all that is broken and the last events."""
        problems = [*self._slots.problems()]
        problems += ledger_problems(self._slots, self._owners, self._leases, self._offers, self._loads)
        if self._ssd is not None:
            problems += self._ssd.problems(load.ssd_slots for load in self._loads.values() if load.ssd_slots is not None)
        if self._retention is not None:
            problems += self._retention.problems()
        if problems:
            story = "".join(f"\n  {now:.6f} {_line(event)}" for now, event in self._story)
            raise InvariantError(f"{'; '.join(problems)}. What happened last:{story}")

    # --- owners ------------------------------------------------------------------------------------------------

    def _join(self, name: str, epoch: int, now: float) -> list[PoolAnswer]:
        owner = self._owners.get(name)
        if owner is not None:
            if epoch < owner.epoch or (epoch == owner.epoch and not owner.alive):
                return self._refuse("stale_epoch", f"{name} epoch {epoch} cannot join; {_incarnation(owner)}")
            if epoch == owner.epoch:
                return []
            self._bury(owner, now)
        self._owners[name] = Owner(name, epoch)
        return []

    def _lose(self, name: str, epoch: int, now: float) -> list[PoolAnswer]:
        """Also an owner that never joined is remembered as dead: its first messages may still be on their way."""
        owner = self._owners.get(name)
        if owner is not None:
            if epoch < owner.epoch:
                return self._refuse("stale_epoch", f"{name} epoch {epoch} is long gone; {_incarnation(owner)}")
            self._bury(owner, now)
        self._owners[name] = Owner(name, epoch, alive=False)
        return []

    def _bury(self, owner: Owner, now: float) -> None:
        for lease_id in list(owner.leases):
            self._close(lease_id, now)
        self._slots.give_back(sorted(owner.reserved))
        owner.reserved.clear()
        owner.alive = False

    # --- puts --------------------------------------------------------------------------------------------------

    def _reserve(self, owner: Owner, event: PutStart, now: float) -> list[PoolAnswer]:
        slots, removed = self._take(event.count, now, event.tenant)
        owner.reserved.update(slots)
        return [*removed, Reserved(slots)]

    def _put(self, owner: Owner, lease_id: str, keys: tuple[BlockKey, ...], now: float) -> Put:
        lease = self._held(owner, lease_id)
        if lease is None:
            return Put((), self._not_held(owner, lease_id))
        slots, removed = self._take(len(keys), now, lease.tenant)
        if not slots:
            return Put(slots, removed)
        if len(slots) < len(keys):
            keys = keys[: len(slots)]
        if self._retention is None and (blocks := self._slots.publish_new(keys, slots, len(lease.slots))):
            lease.slots += slots
            lease.pinned += blocks
            if self._ssd is not None:
                self._ssd.published(keys, now)
            return Put(slots, removed, keys)
        owner.reserved.update(slots)
        keyed = tuple([KeyedSlot(key, slot) for key, slot in zip(keys, slots, strict=True)])
        return Put(slots, removed + self._publish(owner, PutEnd(owner.name, owner.epoch, lease_id, keyed), now))

    def _take(self, count: int, now: float, tenant: str = "") -> tuple[tuple[int, ...], list[PoolAnswer]]:
        """Slots, and what to say about the blocks that were evicted for them."""
        removed: list[PoolAnswer] = []
        if self._retention is not None and (room := self._retention.quotas.room(tenant)) is not None:
            own = self._retention.evict_own(tenant, count - room - len(self._slots.free), now)
            removed = self._evicted(own, "quota", now)
            count = min(count, len(self._slots.free) + room)
        slots, evicted = self._slots.take(count, now)
        if evicted:
            removed += self._evicted(evicted, "evicted", now)
        return slots, removed

    def _evicted(self, blocks: list[Block], reason: str, now: float) -> list[PoolAnswer]:
        """DRAM let go of these."""
        if not blocks:
            return []
        self._counters.evictions[reason] += len(blocks)
        if self._ssd is not None:
            self._ssd.evicted(blocks, now)
        return [Removed(tuple([block.key for block in blocks]), reason)]

    def _publish(self, owner: Owner, event: PutEnd, now: float) -> list[PoolAnswer]:
        lease = self._held(owner, event.lease)
        if lease is None:
            return self._not_held(owner, event.lease)
        if bad := self._not_givable(owner, lease, [block.slot for block in event.blocks]):
            return self._refuse("bad_slot", f"{event.owner} cannot publish slots {bad}: neither reserved nor private here")
        return self._fill_and_tell(owner, lease, event.blocks, now)

    def _insert(self, owner: Owner, event: Insert, now: float) -> list[PoolAnswer]:
        if bad := self._not_givable(owner, None, [block.slot for block in event.blocks]):
            return self._refuse("bad_slot", f"{event.owner} cannot insert slots {bad}: not reserved by it")
        if event.tenant and self._retention is None:
            self._retain()
        lease = Lease(event.owner, [], event.tenant)
        answers = self._fill_and_tell(owner, lease, event.blocks, now)
        self._let_go(lease, now)
        return answers

    def _fill_and_tell(self, owner: Owner, lease: Lease, blocks: Sequence[KeyedSlot], now: float) -> list[PoolAnswer]:
        removed: list[PoolAnswer] = []
        if self._retention is None:
            stored = self._fill(owner, lease, blocks, now)
        else:
            stored, removed = self._fill_for_tenant(self._retention, owner, lease, blocks, now)
        if self._ssd is not None:
            self._ssd.published(stored, now)
        return [*removed, Stored(tuple(stored))] if stored else removed

    def _fill(self, owner: Owner, lease: Lease, blocks: Sequence[KeyedSlot], now: float) -> list[BlockKey]:
        """Publish what the lease holds or the owner has reserved; the keys that were not published before."""
        slots, keys = tuple([block.slot for block in blocks]), tuple([block.key for block in blocks])
        if owner.reserved.issuperset(slots) and (new := self._slots.publish_new(keys, slots, len(lease.slots))):
            owner.reserved.difference_update(slots)
            lease.slots += slots
            lease.pinned += new
            return list(keys)
        private, held, reserved, publish = lease.private, lease.slots, owner.reserved, self._slots.publish
        stored: list[BlockKey] = []
        for block in blocks:
            key, slot = block.key, block.slot
            if slot in reserved:
                reserved.remove(slot)
                depth = len(held)
                held.append(slot)
            else:
                depth = private.pop(slot)
            first = publish(key, slot, depth, now)
            lease.pinned.append(first)
            if first.slot == slot:
                stored.append(key)
            else:
                private[slot] = depth
                self._counters.duplicates += 1
        return stored

    def _revoke(self, owner: Owner, event: PutRevoke, now: float) -> list[PoolAnswer]:
        slots = event.slots
        if bad := self._not_givable(owner, None, slots):
            return self._refuse("bad_slot", f"slots {bad} are not reserved by the one that revokes them")
        owner.reserved.difference_update(slots)
        self._slots.give_back(slots)
        return []

    # --- leases ------------------------------------------------------------------------------------------------

    def _lease(
        self, owner: Owner, lease_id: str, keys: tuple[BlockKey, ...], tenant: str, is_lookup: bool, now: float
    ) -> list[PoolAnswer]:
        if lease_id in self._leases:
            return self._refuse("lease_exists", f"lease {lease_id!r} is open already")
        blocks = self._slots.pin_prefix(keys, now)
        if is_lookup:
            self._counters.lookups += len(keys)
            self._counters.hits += len(blocks)
        lease = self._leases[lease_id] = Lease(owner.name, blocks, tenant)
        if tenant and self._retention is None:
            self._retain()
        owner.leases[lease_id] = None
        if self._ssd is None:
            return [Leased(lease_id, tuple(lease.slots))]
        on_ssd = len(self._ssd.prefix(keys[len(blocks) :]))
        if is_lookup:
            self._ssd.counters.ssd_hits += on_ssd
        return [Leased(lease_id, tuple(lease.slots), on_ssd)]

    def _release(self, owner: Owner, lease_id: str, slots: tuple[int, ...], now: float) -> list[PoolAnswer]:
        lease = self._leases.get(lease_id)
        if lease is not None and lease.owner is not None and lease.owner != owner.name:
            return self._refuse("unknown_lease", f"lease {lease_id!r} belongs to {lease.owner}, not to {owner.name}")
        if slots:
            if bad := self._not_givable(owner, lease, slots):
                return self._refuse("bad_slot", f"{owner.name} cannot free slots {bad}: neither reserved nor private here")
            freed = [slot for slot in slots if slot in owner.reserved]
            owner.reserved.difference_update(freed)
            self._slots.give_back(freed)
        if lease is not None:
            self._close(lease_id, now)
        return []

    def _offer(self, owner: Owner, lease_id: str, slots: tuple[int, ...], deadline_s: float) -> list[PoolAnswer]:
        lease = self._held(owner, lease_id)
        if lease is None:
            return self._not_held(owner, lease_id)
        if slots and (bad := self._not_givable(owner, lease, slots)):
            return self._refuse("bad_slot", f"{owner.name} cannot offer slots {bad}: neither reserved nor private here")
        for slot in slots:
            if slot in owner.reserved:
                owner.reserved.remove(slot)
                lease.private[slot] = len(lease.slots)
                lease.slots.append(slot)
        del owner.leases[lease_id]
        self._offers[lease_id] = None
        lease.owner, lease.deadline_s = None, deadline_s
        return []

    def _adopt(self, owner: Owner, event: AdoptLease, now: float) -> list[PoolAnswer]:
        self._expire_offers(now)
        lease = self._leases.get(event.lease)
        if lease is None or lease.owner is not None:
            return self._refuse("unknown_lease", f"lease {event.lease!r} is not on offer")
        lease.owner = event.owner
        del self._offers[event.lease]
        owner.leases[event.lease] = None
        return [Leased(event.lease, tuple(lease.slots))]

    def _expire_offers(self, now: float) -> list[PoolAnswer]:
        over = [lease_id for lease_id in self._offers if self._leases[lease_id].deadline_s <= now]
        for lease_id in over:
            self._close(lease_id, now)
        self._counters.expired_offers += len(over)
        return []

    def _held(self, owner: Owner, lease_id: str) -> Lease | None:
        return self._leases[lease_id] if lease_id in owner.leases else None

    def _close(self, lease_id: str, now: float) -> None:
        """End a lease: free what is private to it, unpin the rest deepest first."""
        lease = self._leases[lease_id]
        del self._leases[lease_id]
        if lease.owner is None:
            del self._offers[lease_id]
        else:
            del self._owners[lease.owner].leases[lease_id]
        self._let_go(lease, now)

    def _let_go(self, lease: Lease, now: float) -> None:
        if lease.private:
            self._slots.give_back(lease.private)
        self._slots.unpin(lease.pinned, now)

    # --- loads and fetches -------------------------------------------------------------------------------------

    def _start_load(self, owner: Owner, event: LoadStart, now: float) -> list[PoolAnswer]:
        if refusal := self._refuse_load(owner, event):
            return refusal
        found = self._ssd.prefix(event.keys) if self._ssd is not None else []
        slots, removed = self._take(len(found), now, self._leases[event.lease].tenant)
        ssd_slots = tuple(found[: len(slots)])
        if self._ssd is not None and slots:
            self._ssd.pin(ssd_slots, now)
            self._loads[event.lease] = Load(owner, self._leases[event.lease], slots, ssd_slots)
        return [*removed, Loading(event.lease, slots, ssd_slots)]

    def _start_fetch(self, owner: Owner, event: FetchStart, now: float) -> list[PoolAnswer]:
        if refusal := self._refuse_load(owner, event):
            return refusal
        slots, removed = self._take(event.count, now, self._leases[event.lease].tenant)
        if slots:
            self._loads[event.lease] = Load(owner, self._leases[event.lease], slots)
        return [*removed, Fetching(event.lease, slots)]

    def _refuse_load(self, owner: Owner, event: LoadStart | FetchStart) -> list[PoolAnswer]:
        """Why nothing can be loaded or fetched for the lease; empty when it can."""
        if self._held(owner, event.lease) is None:
            return self._not_held(owner, event.lease)
        if event.lease in self._loads:
            return self._refuse("loading", f"a load or fetch for lease {event.lease!r} is under way")
        return []

    def _end_load(self, event: LoadDone, now: float) -> list[PoolAnswer]:
        load = self._loads.get(event.lease)
        if load is None or load.ssd_slots is None or self._ssd is None:
            return self._refuse("unknown_lease", f"no load for lease {event.lease!r} is under way")
        failed = frozenset(event.failed)
        if bad := sorted(failed.difference(load.ssd_slots)):
            return self._refuse("bad_slot", f"ssd slots {bad} are not read for lease {event.lease!r}")
        lost = self._ssd.unpin(load.ssd_slots, failed, now)
        answers: list[PoolAnswer] = [Removed(lost, "failed", Tier.SSD)] if lost else []
        num_good = next((i for i, ssd_slot in enumerate(load.ssd_slots) if ssd_slot in failed), len(load.slots))
        self._ssd.counters.loaded += num_good
        return answers + self._deliver(event.lease, load, num_good)

    def _end_fetch(self, event: FetchDone) -> list[PoolAnswer]:
        load = self._loads.get(event.lease)
        if load is None or load.ssd_slots is not None:
            return self._refuse("unknown_lease", f"no fetch for lease {event.lease!r} is under way")
        if not 0 <= event.num_good <= len(load.slots):
            return self._refuse("bad_slot", f"{event.num_good} of {len(load.slots)} slots fetched for lease {event.lease!r}?")
        self._counters.fetched += event.num_good
        self._counters.failed_fetches += len(load.slots) - event.num_good
        return self._deliver(event.lease, load, event.num_good)

    def _deliver(self, lease_id: str, load: Load, num_good: int) -> list[PoolAnswer]:
        """The slots go to the owner that asked, as far as they are filled and it still holds the lease."""
        del self._loads[lease_id]
        if self._held(load.owner, lease_id) is not load.lease:
            self._slots.give_back(load.slots)
            return []
        self._slots.give_back(load.slots[num_good:])
        load.owner.reserved.update(load.slots[:num_good])
        return [Loaded(lease_id, load.slots[:num_good])]

    # --- what is kept, and whose it is -------------------------------------------------------------------------

    def _retain(self) -> Retention:
        """The order that knows pins and quotas, from the first one on."""
        if self._retention is None:
            self._retention = self._slots.reorder(Retention)
        return self._retention

    def _pin(self, owner: Owner, event: Pin, now: float) -> list[PoolAnswer]:
        pins = self._retain().pins
        num_blocks = self._retain().pin(event.keys, event.until_s, event.priority, now)
        if num_blocks is None:
            return self._refuse(
                "pins_full", f"{pins.num_pinned} of at most {pins.max_pinned} slots are pinned; unpin some first"
            )
        return [Pinned(num_blocks)]

    def _unpin(self, owner: Owner, event: Unpin, now: float) -> list[PoolAnswer]:
        if self._retention is not None:
            self._retention.unpin(event.keys, now)
        return []

    def _set_quota(self, owner: Owner, event: SetQuota, now: float) -> list[PoolAnswer]:
        if event.slots is not None and event.slots < 0:
            return self._refuse("bad_quota", f"a quota is 0 slots or more, got {event.slots} for {event.tenant!r}")
        limits = self._retain().quotas.limits
        limits.pop(event.tenant, None)
        if event.slots is not None:
            limits[event.tenant] = event.slots
        return []

    def _tick(self, now: float) -> list[PoolAnswer]:
        answers = self._expire_offers(now)
        if self._retention is None:
            return answers
        self._retention.expire(now)
        if self._ssd is None or len(self._slots.free) >= self._low_free:
            return answers
        return answers + self._evicted(self._retention.evict_copies(self._high_free, self._ssd.index, now), "demoted", now)

    def _fill_for_tenant(
        self, retention: Retention, owner: Owner, lease: Lease, blocks: Sequence[KeyedSlot], now: float
    ) -> tuple[list[BlockKey], list[PoolAnswer]]:
        """As `_fill`, as far as the tenant's quota goes; the rest is private to the lease. And what had to go for it."""
        quotas, tenant = retention.quotas, lease.tenant
        stored: list[BlockKey] = []
        gone: list[Block] = []
        for block in blocks:
            if not lease.is_full and block.key not in self._slots.index and quotas.room(tenant) == 0:
                own = retention.evict_own(tenant, 1, now)
                gone += own
                lease.is_full = not own
            if lease.is_full:
                self._hold(owner, lease, block.slot)
                continue
            if new := self._fill(owner, lease, (block,), now):
                quotas.entered(self._slots.index[block.key], tenant)
                stored += new
        return stored, self._evicted(gone, "quota", now)

    def _hold(self, owner: Owner, lease: Lease, slot: int) -> None:
        """What stays private to the lease instead of being published."""
        self._counters.over_quota += 1
        if slot in owner.reserved:
            owner.reserved.remove(slot)
            lease.private[slot] = len(lease.slots)
            lease.slots.append(slot)

    # --- forgetting --------------------------------------------------------------------------------------------

    def _drop(self, owner: Owner, event: DropBlocks, now: float) -> list[PoolAnswer]:
        return self._forget(event.keys, now)

    def _clear(self, owner: Owner, event: Clear, now: float) -> list[PoolAnswer]:
        return self._forget([*self._slots.index, *(self._ssd.keys() if self._ssd is not None else ())], now)

    def _forget(self, keys: Sequence[BlockKey], now: float) -> list[PoolAnswer]:
        unleased = [key for key in keys if not self._slots.is_pinned(key)]
        on_ssd = self._ssd.forget(unleased, now) if self._ssd is not None else []
        in_dram = self._slots.forget(unleased, now)
        gone = ((in_dram, Tier.DRAM), (on_ssd, Tier.SSD))
        return [Removed(tuple(keys), "cleared", tier) for keys, tier in gone if keys]

    # --- the SSD -----------------------------------------------------------------------------------------------

    def _end_spill(self, event: SpillDone, now: float) -> list[PoolAnswer]:
        if self._ssd is None or event.ssd_slot not in self._ssd.writes:
            return self._refuse("bad_slot", f"ssd slot {event.ssd_slot} is not being written")
        key = self._ssd.spill_done(event.ssd_slot, event.ok, now)
        return [Stored((key,), Tier.SSD)] if key is not None else []

    def _find(self, event: SsdFound, now: float) -> list[PoolAnswer]:
        if self._ssd is None:
            return self._refuse("bad_slot", "this node has no SSD")
        if why := self._ssd.refusal_of(event.blocks):
            return self._refuse("bad_slot", why)
        keys = self._ssd.found(event.blocks, now)
        return [Stored(keys, Tier.SSD)] if keys else []

    def _spill(self, ssd: SsdTier, now: float) -> list[PoolAnswer]:
        """Have erased what must be, then start what writes can be started."""
        answers: list[PoolAnswer] = []
        if ssd.to_erase:
            answers.append(Erase(tuple(ssd.to_erase)))
            ssd.to_erase.clear()
        if not ssd.waiting:
            return answers
        spills = ssd.next_spills(now)
        if spills.evicted:
            answers.append(Removed(spills.evicted, "evicted", Tier.SSD))
        return [*answers, *spills.starts]

    def _with_ssd(self, stats: PoolStats, ssd: SsdTier) -> PoolStats:
        counters = ssd.counters
        return replace(
            stats,
            ssd_slots=ssd.num_slots,
            ssd_free=len(ssd.free),
            ssd_published=len(ssd.index),
            writing=len(ssd.writes),
            spilling=len(self._slots.gone),
            spills_waiting=len(ssd.waiting),
            loading=sum(len(load.slots) for load in self._loads.values() if load.ssd_slots is not None),
            spilled=counters.spilled,
            failed_spills=counters.failed_spills,
            dropped=counters.dropped,
            loaded=counters.loaded,
            failed_loads=counters.failed_loads,
            ssd_hits=counters.ssd_hits,
            ssd_evictions=counters.ssd_evictions,
        )

    # --- validation --------------------------------------------------------------------------------------------

    def _not_givable(self, owner: Owner, lease: Lease | None, slots: Sequence[int]) -> list[int]:
        """Those of `slots` that this owner has no say over, or that are named twice."""
        named = set(slots)
        bad = named.difference(owner.reserved, lease.private if lease is not None else ())
        return sorted(bad) or ([] if len(named) == len(slots) else sorted(slots))

    def _not_held(self, owner: Owner, lease_id: str) -> list[PoolAnswer]:
        return self._refuse("unknown_lease", f"{owner.name} does not hold lease {lease_id!r}")

    def _refuse(self, code: Code, message: str) -> list[PoolAnswer]:
        self._counters.refusals += 1
        return [Refused(code, message)]


_OF_OWNERS: Final[dict[type[PoolEvent], Callable[[PoolNode, Owner, Any, float], list[PoolAnswer]]]] = {
    PutStart: PoolNode._reserve,
    PutEnd: PoolNode._publish,
    Insert: PoolNode._insert,
    PutRevoke: PoolNode._revoke,
    LeaseBlocks: lambda self, owner, e, now: self._lease(owner, e.lease, e.keys, e.tenant, e.is_lookup, now),
    LoadStart: PoolNode._start_load,
    FetchStart: PoolNode._start_fetch,
    DropBlocks: PoolNode._drop,
    Pin: PoolNode._pin,
    Unpin: PoolNode._unpin,
    SetQuota: PoolNode._set_quota,
    Clear: PoolNode._clear,
    ReleaseLease: lambda self, owner, e, now: self._release(owner, e.lease, e.slots, now),
    OfferLease: lambda self, owner, e, now: self._offer(owner, e.lease, e.slots, e.deadline_s),
    AdoptLease: PoolNode._adopt,
}
"""What is answered to a living owner only."""


def _incarnation(owner: Owner | None) -> str:
    if owner is None:
        return "it never joined"
    return f"epoch {owner.epoch} {'is here' if owner.alive else 'has died'}"


def _line(event: object) -> str:
    text = repr(event)
    return text if len(text) <= 200 else f"{text[:200]}…"
