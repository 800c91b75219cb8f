"""The brain of one node's pool: which slot holds which block, who reserved, fills or reads it, and what is evicted.

    free ──PutStart──▶ reserved ──PutEnd──▶ published ──(no lease, space needed)──▶ free
                          │  └─OfferLease─▶ private ──PutEnd──▶ published
                          └──PutRevoke, owner died──▶ free

Everything is validated before anything is changed, so a Refused event leaves no trace. Blocks are released deepest first, and
a lease pins every published block of its sequence, so an evictor that honours the order never strands a suffix.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvasir.core.errors import InvariantError
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import (
    AdoptLease,
    KeyedSlot,
    LeaseBlocks,
    Leased,
    OfferLease,
    OwnerJoined,
    OwnerLost,
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
    Stored,
)
from kvasir.pool.eviction import Eviction, Lru
from kvasir.pool.leases import Lease, Owner, ledger_problems
from kvasir.pool.slots import SlotTable

STORY_LENGTH = 64
"""Events that a node remembers, for the story of a broken invariant."""

Code = Literal["stale_epoch", "unknown_lease", "lease_exists", "bad_slot"]


@dataclass(slots=True)
class Counters:
    """What happened since the start; the fields of the same names in PoolStats."""

    lookups: int = 0
    hits: int = 0
    evictions: int = 0
    duplicates: int = 0
    expired_offers: int = 0
    refusals: int = 0


class PoolNode:
    """Takes events of core/pool_events.py and answers."""

    def __init__(self, num_slots: int, eviction: Eviction | None = None):
        self.num_slots = num_slots
        self._slots = SlotTable(num_slots, eviction if eviction is not None else Lru())
        self._owners: dict[str, Owner] = {}
        self._leases: dict[str, Lease] = {}
        self._offers: dict[str, None] = {}
        self._story: deque[tuple[float, PoolEvent]] = deque(maxlen=STORY_LENGTH)
        self._counters = Counters()

    def handle(self, event: PoolEvent, now: float) -> list[PoolAnswer]:
        """Answers to the owner that asked, and Stored and Removed to whoever keeps a directory."""
        self._story.append((now, event))
        match event:
            case PoolTick():
                return self._expire_offers(now)
            case OwnerJoined(owner=name, epoch=epoch):
                return self._join(name, epoch, now)
            case OwnerLost(owner=name, epoch=epoch):
                return self._lose(name, epoch, now)
        owner = self._owners.get(event.owner)
        if owner is None or not owner.alive or owner.epoch != event.epoch:
            return self._refuse("stale_epoch", f"{event.owner} epoch {event.epoch} is not here; {_incarnation(owner)}")
        match event:
            case PutStart(count=count):
                return self._reserve(owner, count, now)
            case PutEnd():
                return self._publish(owner, event)
            case PutRevoke(slots=slots):
                return self._revoke(owner, slots)
            case LeaseBlocks():
                return self._lease(owner, event)
            case ReleaseLease():
                return self._release(owner, event, now)
            case OfferLease():
                return self._offer(owner, event)
            case AdoptLease():
                return self._adopt(owner, event, now)
        raise TypeError(f"not a pool event: {event!r}")

    def inventory(self) -> tuple[BlockKey, ...]:
        """The keys of all published blocks, oldest first."""
        return tuple(self._slots.index)

    def stats(self) -> PoolStats:
        counters = self._counters
        return PoolStats(
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
            evictions=counters.evictions,
            duplicates=counters.duplicates,
            expired_offers=counters.expired_offers,
            refusals=counters.refusals,
        )

    def check(self) -> None:
        """Verify every invariant both ways. Raises InvariantError with all that is broken and the last events."""
        problems = [*self._slots.problems(), *ledger_problems(self._slots, self._owners, self._leases, self._offers)]
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
        self._owners[name] = Owner(epoch)
        return []

    def _lose(self, name: str, epoch: int, now: float) -> list[PoolAnswer]:
        """Also an owner that never joined is remembered as dead: its first messages may still be on their way."""
        owner = self._owners.get(name)
        if owner is not None:
            if epoch < owner.epoch:
                return self._refuse("stale_epoch", f"{name} epoch {epoch} is long gone; {_incarnation(owner)}")
            self._bury(owner, now)
        self._owners[name] = Owner(epoch, alive=False)
        return []

    def _bury(self, owner: Owner, now: float) -> None:
        for lease_id in list(owner.leases):
            self._close(lease_id, now)
        self._slots.give_back(sorted(owner.reserved))
        owner.reserved.clear()
        owner.alive = False

    # --- puts --------------------------------------------------------------------------------------------------

    def _reserve(self, owner: Owner, count: int, now: float) -> list[PoolAnswer]:
        taken = self._slots.take(count, now)
        owner.reserved.update(taken.slots)
        self._counters.evictions += len(taken.evicted)
        removed: list[PoolAnswer] = [Removed(taken.evicted, "evicted")] if taken.evicted else []
        return [*removed, Reserved(taken.slots)]

    def _publish(self, owner: Owner, event: PutEnd) -> list[PoolAnswer]:
        lease = self._held(owner, event.lease)
        if lease is None:
            return self._refuse("unknown_lease", f"{event.owner} does not hold lease {event.lease!r}")
        if bad := self._not_givable(owner, lease, [block.slot for block in event.blocks]):
            return self._refuse("bad_slot", f"{event.owner} cannot publish slots {bad}: neither reserved nor private here")
        stored = [block.key for block in event.blocks if self._publish_one(owner, lease, block)]
        return [Stored(tuple(stored))] if stored else []

    def _publish_one(self, owner: Owner, lease: Lease, block: KeyedSlot) -> bool:
        key, slot = block.key, block.slot
        depth = lease.private.pop(slot, None)
        if depth is None:
            owner.reserved.discard(slot)
            depth = len(lease.slots)
            lease.slots.append(slot)
        first = self._slots.publish(key, slot, depth)
        lease.pinned.append(first)
        if first == slot:
            return True
        lease.private[slot] = depth
        self._counters.duplicates += 1
        return False

    def _revoke(self, owner: Owner, slots: Sequence[int]) -> list[PoolAnswer]:
        if bad := self._not_givable(owner, None, slots):
            return self._refuse("bad_slot", f"slots {bad} are not reserved by the one that revokes them")
        owner.reserved.difference_update(slots)
        self._slots.give_back(slots)
        return []

    # --- leases ------------------------------------------------------------------------------------------------

    def _lease(self, owner: Owner, event: LeaseBlocks) -> list[PoolAnswer]:
        if event.lease in self._leases:
            return self._refuse("lease_exists", f"lease {event.lease!r} is open already")
        slots = self._slots.pin_prefix(event.keys)
        self._counters.lookups += len(event.keys)
        self._counters.hits += len(slots)
        self._leases[event.lease] = Lease(event.owner, slots, slots.copy())
        owner.leases[event.lease] = None
        return [Leased(event.lease, tuple(slots))]

    def _release(self, owner: Owner, event: ReleaseLease, now: float) -> list[PoolAnswer]:
        lease = self._leases.get(event.lease)
        if lease is not None and lease.owner not in (event.owner, None):
            return self._refuse("unknown_lease", f"lease {event.lease!r} belongs to {lease.owner}, not to {event.owner}")
        if bad := self._not_givable(owner, lease, event.slots):
            return self._refuse("bad_slot", f"{event.owner} cannot free slots {bad}: neither reserved nor private here")
        freed = [slot for slot in event.slots if slot in owner.reserved]
        owner.reserved.difference_update(freed)
        self._slots.give_back(freed)
        if lease is not None:
            self._close(event.lease, now)
        return []

    def _offer(self, owner: Owner, event: OfferLease) -> list[PoolAnswer]:
        lease = self._held(owner, event.lease)
        if lease is None:
            return self._refuse("unknown_lease", f"{event.owner} does not hold lease {event.lease!r}")
        if bad := self._not_givable(owner, lease, event.slots):
            return self._refuse("bad_slot", f"{event.owner} cannot offer slots {bad}: neither reserved nor private here")
        for slot in event.slots:
            if slot in owner.reserved:
                owner.reserved.remove(slot)
                lease.private[slot] = len(lease.slots)
                lease.slots.append(slot)
        del owner.leases[event.lease]
        self._offers[event.lease] = None
        lease.owner, lease.deadline_s = None, event.deadline_s
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
        lease = self._leases.pop(lease_id)
        if lease.owner is None:
            del self._offers[lease_id]
        else:
            del self._owners[lease.owner].leases[lease_id]
        self._slots.give_back(lease.private)
        self._slots.unpin(lease.pinned, now)

    # --- validation --------------------------------------------------------------------------------------------

    def _not_givable(self, owner: Owner, lease: Lease | None, slots: Sequence[int]) -> list[int]:
        """Those of `slots` that this owner has no say over, or that are named twice."""
        bad = set(slots).difference(owner.reserved, lease.private if lease is not None else ())
        return sorted(bad) or _repeated(slots)

    def _refuse(self, code: Code, message: str) -> list[PoolAnswer]:
        self._counters.refusals += 1
        return [Refused(code, message)]


def _repeated(slots: Sequence[int]) -> list[int]:
    return [] if len(set(slots)) == len(slots) else sorted(slots)


def _incarnation(owner: Owner | None) -> str:
    if owner is None:
        return "it never joined"
    return f"epoch {owner.epoch} {'is here' if owner.alive else 'has died'}"


def _line(event: PoolEvent) -> str:
    text = repr(event)
    return text if len(text) <= 200 else f"{text[:200]}…"
