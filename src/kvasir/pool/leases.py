"""Who holds what: the owners and leases that PoolNode keeps, and what must hold between them and the slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from mypy_extensions import mypyc_attr

from kvasir.pool.eviction import Block
from kvasir.pool.slots import SlotTable


@dataclass(slots=True)
class Owner:
    """An incarnation of a process. A dead one is remembered, so that its late messages are known as such."""

    name: str
    epoch: int
    alive: bool = True
    reserved: set[int] = field(default_factory=set)
    leases: dict[str, None] = field(default_factory=dict)


@mypyc_attr(acyclic=True)
class Lease:
    """Slot i of `slots` holds block i. `owner` is None while the lease is on offer, until `deadline_s`.

    `private` maps each private slot to its place in `slots`; `pinned` are the published blocks that this lease keeps, in
    order of depth: those in `slots`, and the first copies of those whose own slot is a private duplicate. `is_full`: its
    `tenant`'s quota did not allow one of its blocks to be published, so that none after it may be.
    """

    __slots__ = ("deadline_s", "is_full", "owner", "pinned", "private", "slots", "tenant")

    def __init__(self, owner: str, blocks: list[Block], tenant: str):
        """`blocks` are published, and pinned for this lease."""
        self.owner: str | None = owner
        self.slots = [block.slot for block in blocks]
        self.pinned = blocks
        self.private: dict[int, int] = {}
        self.deadline_s = 0.0
        self.tenant = tenant
        self.is_full = False


@dataclass(frozen=True, slots=True)
class Load:
    """Slots being filled for a lease, as its owner asked; both may be gone before it is over.

    The bytes come from `ssd_slots`, each into its own slot, or from another node when that is None.
    """

    owner: Owner
    lease: Lease
    slots: tuple[int, ...]
    ssd_slots: tuple[int, ...] | None = None


def ledger_problems(
    slots: SlotTable,
    owners: Mapping[str, Owner],
    leases: Mapping[str, Lease],
    offers: Iterable[str],
    loads: Mapping[str, Load],
) -> Iterator[str]:
    """Each broken invariant between owners, leases, offers, loads and slots, in words."""
    yield from _misplaced_slots(slots, owners, leases, loads)
    yield from _wrong_holders(owners, leases, offers)
    yield from _wrong_contents(slots, leases)


def _misplaced_slots(
    slots: SlotTable, owners: Mapping[str, Owner], leases: Mapping[str, Lease], loads: Mapping[str, Load]
) -> Iterator[str]:
    """Each slot is exactly one of free, reserved by a living owner, private to a lease, published, filled, written out."""
    places = Counter(slots.free)
    places.update(block.slot for block in slots.index.values())
    places.update(slots.gone)
    for load in loads.values():
        places.update(load.slots)
    for owner in owners.values():
        places.update(owner.reserved)
    for lease in leases.values():
        places.update(lease.private.keys())
    if wrong := {slot: places[slot] for slot in range(slots.num_slots) if places[slot] != 1}:
        yield f"slots that are not in exactly one place, with the number of places: {wrong}"
    if strays := sorted(slot for slot in places if not 0 <= slot < slots.num_slots):
        yield f"slots outside of the arena: {strays}"


def _wrong_holders(owners: Mapping[str, Owner], leases: Mapping[str, Lease], offers: Iterable[str]) -> Iterator[str]:
    """The dead hold nothing; owners, offers and leases name each other."""
    for name, owner in owners.items():
        if not owner.alive and (owner.reserved or owner.leases):
            yield f"{name} has died and holds slots {sorted(owner.reserved)} and leases {list(owner.leases)}"
    holders: list[tuple[str, str | None]] = [(lease_id, None) for lease_id in offers]
    holders += [(lease_id, name) for name, owner in owners.items() for lease_id in owner.leases]
    if Counter(holders) != Counter((lease_id, lease.owner) for lease_id, lease in leases.items()):
        yield f"owners and offers disagree with the leases on who holds what: {holders}"


def _wrong_contents(slots: SlotTable, leases: Mapping[str, Lease]) -> Iterator[str]:
    """A lease's slots are private or pinned by it, each once, and every pin is some lease's."""
    pins: Counter[Block] = Counter()
    for lease_id, lease in leases.items():
        pins.update(lease.pinned)
        held = lease.private.keys() | {block.slot for block in lease.pinned}
        if len(set(lease.slots)) != len(lease.slots) or not held.issuperset(lease.slots):
            yield f"lease {lease_id!r} holds slots twice, or some that are neither private nor pinned: {lease.slots}"
        if any(lease.slots[place] != slot for slot, place in lease.private.items()):
            yield f"lease {lease_id!r} misplaces its private slots: {lease.private} in {lease.slots}"
    if wrong := {block.slot: block.pins for block in slots.index.values() if block.pins != pins[block]}:
        yield f"pins that no lease explains, by slot: {wrong}"
    if lost := sorted(block.slot for block in pins.keys() - set(slots.index.values())):
        yield f"leases pin blocks in slots {lost} that are not published"
