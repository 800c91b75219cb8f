"""PoolNode against a naive model: random events of several owners, incarnations and leases, checked after each one.

Once without and once with an SSD. Fetches, and the SSD's writes and reads, end, well or not, in any order and also after those
that asked died.
Keys spell out the path to their block, so the model knows every block's parent and can tell a stranded suffix.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
    PoolAnswer,
    PoolEvent,
    PoolTick,
    PutEnd,
    PutRevoke,
    PutStart,
    Refused,
    ReleaseLease,
    Removed,
    Reserved,
    Spill,
    SpillDone,
    Stored,
)
from kvasir.core.tier import Tier
from kvasir.pool.node import PoolNode

NUM_SLOTS = 6
OFFER_S = 3.0
NUM_SSD_SLOTS = 5
MAX_SPILLING = 2

OWNERS = st.sampled_from(["p", "d"])
HOLDERS = st.sampled_from([None, None, None, None, "p", "d"])  # None is whoever holds the lease
EPOCHS = st.sampled_from([0] * 9 + [1])  # how far the sender is from the newest incarnation
LEASES = st.sampled_from(["r0", "r1", "r2"])
PATHS = st.sampled_from([b"aaaa", b"aabb", b"abbb", b"bbbb"])
STRAYS = st.none() | st.integers(0, NUM_SLOTS)
COUNTS = st.integers(0, 4)


@dataclass
class ModelLease:
    """`path` is the sequence that the lease follows; `filled` blocks of it are published or duplicates of published ones."""

    owner: str | None
    path: bytes
    slots: list[int]
    filled: int
    private: set[int] = field(default_factory=set)
    deadline_s: float = 0.0

    @property
    def keys(self) -> set[bytes]:
        """Every published key that the lease stands on."""
        return {self.path[: i + 1] for i in range(self.filled)}


@dataclass
class ModelLoad:
    """A load from `ssd_slots`, or a fetch when that is None."""

    owner: str
    epoch: int
    lease: ModelLease
    keys: tuple[bytes, ...]
    slots: tuple[int, ...]
    ssd_slots: tuple[int, ...] | None = None


class NodeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.node = PoolNode(NUM_SLOTS)
        self.now = 0.0
        self.free = set(range(NUM_SLOTS))
        self.writing: dict[int, tuple[bytes, int]] = {}  # ssd slot → key, slot
        self.leaving: set[int] = set()  # slots whose block was evicted while it is written out
        self.epochs: dict[str, int] = {}
        self.alive: set[str] = set()
        self.reserved: dict[str, set[int]] = {}
        self.published: dict[bytes, int] = {}
        self.leases: dict[str, ModelLease] = {}
        self.loads: dict[str, ModelLoad] = {}
        self.fetched = self.failed_fetches = 0
        self.dropped: set[bytes] = set()  # at one time or other; what followed on them is on its own

    @initialize()
    def everybody_joins(self) -> None:
        for owner in ("p", "d"):
            self.join(owner, 0)

    # --- events ------------------------------------------------------------------------------------------------

    @rule(owner=OWNERS, newer=EPOCHS)
    def join(self, owner: str, newer: int) -> None:
        epoch = self.epochs.get(owner, 0) + newer
        answers = self.tell(OwnerJoined(owner, epoch))
        known = owner in self.epochs
        if known and newer == 0:
            assert self.refused(answers) == ("" if owner in self.alive else "stale_epoch")
            return
        assert answers == []
        self.bury(owner)
        self.epochs[owner], self.reserved[owner] = epoch, set()
        self.alive.add(owner)

    @rule(owner=OWNERS, older=EPOCHS)
    def lose(self, owner: str, older: int) -> None:
        if owner not in self.epochs:
            return
        answers = self.tell(OwnerLost(owner, self.epochs[owner] - older))
        assert self.refused(answers) == ("stale_epoch" if older else "")
        if not older:
            self.bury(owner)

    @rule(owner=OWNERS, older=EPOCHS, count=COUNTS)
    def reserve(self, owner: str, older: int, count: int) -> None:
        answers = self.ask(PutStart(owner, self.epoch(owner, older), count))
        if answers is None:
            return
        *removed, answer = answers
        self.make_room(removed, count)
        assert isinstance(answer, Reserved)
        assert len(answer.slots) == min(count, len(self.free))
        assert len(answer.slots) == count or self.published.keys() <= self.kept(), "not all was evicted that could be"
        assert set(answer.slots) <= self.free
        self.free -= set(answer.slots)
        self.reserved[owner] |= set(answer.slots)

    @rule(owner=OWNERS, older=EPOCHS, lease=LEASES, path=PATHS)
    def open_lease(self, owner: str, older: int, lease: str, path: bytes) -> None:
        keys = tuple(path[: i + 1] for i in range(len(path)))
        answers = self.ask(LeaseBlocks(owner, self.epoch(owner, older), lease, keys))
        if answers is None:
            return
        if lease in self.leases:
            assert self.refused(answers) == "lease_exists"
            return
        hit = next((i for i, key in enumerate(keys) if key not in self.published), len(keys))
        slots = [self.published[key] for key in keys[:hit]]
        assert answers == [Leased(lease, tuple(slots), self.num_on_ssd(keys[hit:]))]
        self.leases[lease] = ModelLease(owner, path, slots, hit)

    @rule(holder=HOLDERS, older=EPOCHS, lease=LEASES, count=COUNTS)
    def publish(self, holder: str | None, older: int, lease: str, count: int) -> None:
        """The next blocks of the lease's sequence: its private tail first, then reserved slots."""
        owner = holder or self.holder(lease)
        held = self.leases.get(lease)
        tail = held.slots[held.filled :] if held is not None else []
        slots = [*tail, *sorted(self.reserved.get(owner, ()))][: min(count, len(held.path) - held.filled if held else 4)]
        path = held.path if held is not None else b"aaaa"
        start = held.filled if held is not None else 0
        blocks = tuple(KeyedSlot(path[: start + i + 1], slot) for i, slot in enumerate(slots))
        answers = self.ask(PutEnd(owner, self.epoch(owner, older), lease, blocks))
        if answers is None:
            return
        if held is None or held.owner != owner:
            assert self.refused(answers) == "unknown_lease"
            return
        new = tuple(block.key for block in blocks if block.key not in self.published)
        assert answers == ([Stored(new)] if new else [])
        for block in blocks:
            self.put_one(held, owner, block)

    def put_one(self, held: ModelLease, owner: str, block: KeyedSlot) -> None:
        if block.slot in self.reserved[owner]:
            self.reserved[owner].remove(block.slot)
            held.slots.append(block.slot)
        held.filled += 1
        if self.published.setdefault(block.key, block.slot) == block.slot:
            held.private.discard(block.slot)
        else:
            held.private.add(block.slot)

    @rule(owner=OWNERS, older=EPOCHS, path=PATHS, count=COUNTS, stray=STRAYS)
    def insert(self, owner: str, older: int, path: bytes, count: int, stray: int | None) -> None:
        """A sequence for whoever comes next; who had a block first keeps it, and nobody holds anything for it."""
        slots = sorted(self.reserved.get(owner, ()))[:count]
        if stray is not None and slots:
            slots[-1] = stray
        blocks = tuple(KeyedSlot(path[: i + 1], slot) for i, slot in enumerate(slots))
        answers = self.ask(Insert(owner, self.epoch(owner, older), blocks))
        if answers is None:
            return
        if not self.reserved[owner].issuperset(slots) or len(set(slots)) < len(slots):
            assert self.refused(answers) == "bad_slot"
            return
        new = tuple(block.key for block in blocks if block.key not in self.published)
        assert answers == ([Stored(new)] if new else [])
        self.reserved[owner].difference_update(slots)
        for block in blocks:
            if self.published.setdefault(block.key, block.slot) != block.slot:
                self.free.add(block.slot)

    @rule(owner=OWNERS, lease=LEASES, path=PATHS, count=COUNTS)
    def prefill(self, owner: str, lease: str, path: bytes, count: int) -> None:
        """What an instance does all day; the single events above and below seldom make a whole of it by chance."""
        if owner not in self.alive:
            self.join(owner, 1)
        if lease not in self.leases:
            self.open_lease(owner, 0, lease, path)
            self.reserve(owner, 0, count)
            self.publish(owner, 0, lease, count)

    @rule(path=PATHS, lead=st.integers(1, 2))
    def race(self, path: bytes, lead: int) -> None:
        """Two instances compute the same prompt; the second gets further."""
        if {"p", "d"} <= self.alive and not {"r0", "r1"} & self.leases.keys():
            for owner, lease in (("p", "r0"), ("d", "r1")):
                self.open_lease(owner, 0, lease, path)
            for owner, lease, count in (("p", "r0", 1), ("d", "r1", 1 + lead)):
                self.reserve(owner, 0, count)
                self.publish(owner, 0, lease, count)

    @rule(lease=LEASES, tail=st.integers(1, 2))
    def hand_off(self, lease: str, tail: int) -> None:
        held = self.leases.get(lease)
        if held is not None and held.owner is not None:
            giver, taker = (held.owner, "d" if held.owner == "p" else "p")
            self.reserve(giver, 0, tail)
            self.offer(giver, 0, lease, tail, None)
            self.adopt(taker, 0, lease)

    @rule(owner=OWNERS, older=EPOCHS, slots=st.lists(st.integers(-1, NUM_SLOTS), max_size=3))
    def revoke(self, owner: str, older: int, slots: list[int]) -> None:
        answers = self.ask(PutRevoke(owner, self.epoch(owner, older), tuple(slots)))
        if answers is None:
            return
        if len(set(slots)) < len(slots) or not set(slots) <= self.reserved[owner]:
            assert self.refused(answers) == "bad_slot"
            return
        self.give_back(owner, slots)

    @rule(holder=HOLDERS, older=EPOCHS, lease=LEASES, count=COUNTS, stray=STRAYS)
    def release(self, holder: str | None, older: int, lease: str, count: int, stray: int | None) -> None:
        owner = holder or self.holder(lease)
        slots = sorted(self.reserved.get(owner, ()))[:count] + ([] if stray is None else [stray])
        answers = self.ask(ReleaseLease(owner, self.epoch(owner, older), lease, tuple(slots)))
        if answers is None:
            return
        held = self.leases.get(lease)
        if held is not None and held.owner not in (owner, None):
            assert self.refused(answers) == "unknown_lease"
            return
        if not self.givable(owner, held, slots):
            assert self.refused(answers) == "bad_slot"
            return
        assert answers == []
        self.give_back(owner, [slot for slot in slots if slot in self.reserved[owner]])
        self.close(lease)

    @rule(holder=HOLDERS, older=EPOCHS, lease=LEASES, count=COUNTS, stray=STRAYS)
    def offer(self, holder: str | None, older: int, lease: str, count: int, stray: int | None) -> None:
        owner = holder or self.holder(lease)
        slots = sorted(self.reserved.get(owner, ()))[:count] + ([] if stray is None else [stray])
        held = self.leases.get(lease)
        if held is not None and len(held.slots) + len(slots) > len(held.path):
            return  # a sequence has no more blocks than its path
        answers = self.ask(OfferLease(owner, self.epoch(owner, older), lease, tuple(slots), self.now + OFFER_S))
        if answers is None:
            return
        if held is None or held.owner != owner:
            assert self.refused(answers) == "unknown_lease"
            return
        if not self.givable(owner, held, slots):
            assert self.refused(answers) == "bad_slot"
            return
        assert answers == []
        tail = [slot for slot in slots if slot in self.reserved[owner]]
        self.reserved[owner] -= set(tail)
        held.slots += tail
        held.private |= set(tail)
        held.owner, held.deadline_s = None, self.now + OFFER_S

    @rule(owner=OWNERS, older=EPOCHS, lease=LEASES)
    def adopt(self, owner: str, older: int, lease: str) -> None:
        answers = self.ask(AdoptLease(owner, self.epoch(owner, older), lease))
        if answers is None:
            return
        self.expire()
        held = self.leases.get(lease)
        if held is None or held.owner is not None:
            assert self.refused(answers) == "unknown_lease"
            return
        assert answers == [Leased(lease, tuple(held.slots))]
        held.owner = owner

    @rule(seconds=st.sampled_from([0.5, 1.0, OFFER_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tick(self) -> None:
        self.expire()
        assert self.tell(PoolTick("body", 0)) == []

    # --- fetches -----------------------------------------------------------------------------------------------

    @rule(holder=HOLDERS, older=EPOCHS, lease=LEASES, count=COUNTS)
    def start_fetch(self, holder: str | None, older: int, lease: str, count: int) -> None:
        owner, held = holder or self.holder(lease), self.leases.get(lease)
        if held is not None:
            count = min(count, len(held.path) - len(held.slots))
        answers = self.ask(FetchStart(owner, self.epoch(owner, older), lease, count))
        if answers is None or not self.may_load(answers, owner, lease):
            return
        *removed, answer = answers
        self.make_room(removed, count)
        assert isinstance(answer, Fetching)
        self.fill(owner, lease, tuple(held.path[: len(held.slots) + i + 1] for i in range(count)) if held else (), answer.slots)

    def may_load(self, answers: list[PoolAnswer], owner: str, lease: str) -> bool:
        """Whether a load or fetch can begin, and that the node says so."""
        held = self.leases.get(lease)
        code = "unknown_lease" if held is None or held.owner != owner else "loading" if lease in self.loads else ""
        assert self.refused(answers) == code
        return not code

    def make_room(self, removed: list[PoolAnswer], count: int) -> None:
        assert not removed or count > len(self.free), "evicted without need"
        for gone in removed:
            assert isinstance(gone, Removed)
            assert not set(gone.keys) & self.kept(), "a leased or pinned block was evicted"
            self.evict(gone.keys)

    def fill(
        self, owner: str, lease: str, keys: tuple[bytes, ...], slots: tuple[int, ...], ssd_slots: tuple[int, ...] | None = None
    ) -> None:
        """These slots are being filled from now on, with as many of the blocks as there was room for."""
        assert len(slots) == min(len(keys), len(self.free))
        assert len(slots) == len(keys) or self.published.keys() <= self.kept(), "not all was evicted that could be"
        assert set(slots) <= self.free
        self.free -= set(slots)
        if slots:
            self.loads[lease] = ModelLoad(owner, self.epochs[owner], self.leases[lease], keys[: len(slots)], slots, ssd_slots)

    @rule(lease=LEASES, failed=st.sampled_from([0, 0, 1, 2, 9]), publish=st.booleans())
    def fetch_ends(self, lease: str, failed: int, publish: bool) -> None:
        load = self.loads.get(lease)
        if load is None or load.ssd_slots is not None:
            assert self.refused(self.tell(FetchDone("messenger", 0, lease, 0))) == "unknown_lease"
            return
        for nonsense in (-1, len(load.slots) + 1):
            assert self.refused(self.tell(FetchDone("messenger", 0, lease, nonsense))) == "bad_slot"
        num_good = max(0, len(load.slots) - failed)
        self.fetched += num_good
        self.failed_fetches += len(load.slots) - num_good
        del self.loads[lease]
        self.deliver(lease, load, num_good, self.tell(FetchDone("messenger", 0, lease, num_good)), publish)

    def deliver(self, lease: str, load: ModelLoad, num_good: int, answers: list[PoolAnswer], publish: bool) -> None:
        """A load or fetch has ended with these answers."""
        if self.leases.get(lease) is not load.lease or load.lease.owner != load.owner or self.epochs[load.owner] != load.epoch:
            assert answers == []
            self.free |= set(load.slots)
            return
        assert answers == [Loaded(lease, load.slots[:num_good])]
        self.reserved[load.owner] |= set(load.slots[:num_good])
        self.free |= set(load.slots[num_good:])
        if publish:
            self.publish(load.owner, 0, lease, num_good)

    @rule(owner=OWNERS, lease=LEASES, path=PATHS, failed=st.sampled_from([0, 0, 1]))
    def fetch_from_elsewhere(self, owner: str, lease: str, path: bytes, failed: int) -> None:
        """What a prompt does whose blocks another node has."""
        if owner in self.alive and lease not in self.leases and lease not in self.loads:
            self.open_lease(owner, 0, lease, path)
            self.start_fetch(owner, 0, lease, 2)
            self.fetch_ends(lease, failed, True)

    # --- forgetting --------------------------------------------------------------------------------------------

    @rule(owner=OWNERS, older=EPOCHS, path=PATHS, start=st.integers(0, 3), count=COUNTS)
    def drop(self, owner: str, older: int, path: bytes, start: int, count: int) -> None:
        keys = tuple(path[: i + 1] for i in range(start, min(start + count, len(path))))
        answers = self.ask(DropBlocks(owner, self.epoch(owner, older), keys))
        if answers is not None:
            self.forget(keys, answers)

    @rule(owner=OWNERS, older=EPOCHS, really=st.sampled_from([False] * 4 + [True]))
    def clear(self, owner: str, older: int, really: bool) -> None:
        keys = tuple(sorted(self.known()))
        if really and (answers := self.ask(Clear(owner, self.epoch(owner, older)))) is not None:
            self.forget(keys, answers)

    def known(self) -> set[bytes]:
        """Every block that is somewhere in the pool."""
        return set(self.published)

    def forget(self, keys: tuple[bytes, ...], answers: list[PoolAnswer]) -> None:
        gone = set(keys) & self.published.keys() - self.pinned()
        self.dropped |= set(keys)
        if gone:
            answer = answers.pop(0)
            assert isinstance(answer, Removed)
            assert (set(answer.keys), answer.reason, answer.tier) == (gone, "cleared", Tier.DRAM)
            self.evict(answer.keys)
        assert answers == []

    # --- what must always hold ---------------------------------------------------------------------------------

    @invariant()
    def nothing_is_broken(self) -> None:
        self.node.check()

    @invariant()
    def the_node_agrees_with_the_model(self) -> None:
        stats = self.node.stats()
        assert stats.free == len(self.free)
        assert stats.reserved == sum(map(len, self.reserved.values()))
        assert stats.private == sum(len(lease.private) for lease in self.leases.values())
        assert stats.published == len(self.published)
        assert stats.leased == len(self.pinned())
        assert stats.leases == len(self.leases)
        assert stats.owners == len(self.alive)
        assert stats.fetching == sum(len(load.slots) for load in self.loads.values() if load.ssd_slots is None)
        assert (stats.fetched, stats.failed_fetches) == (self.fetched, self.failed_fetches)
        assert set(self.node.inventory()) == set(self.published)

    @invariant()
    def no_suffix_is_stranded(self) -> None:
        assert all(key[:-1] in self.published | dict.fromkeys(self.dropped) for key in self.published if len(key) > 1)

    # --- the model ---------------------------------------------------------------------------------------------

    def tell(self, event: PoolEvent) -> list[PoolAnswer]:
        return self.node.handle(event, self.now)

    def ask(self, event: PoolEvent) -> list[PoolAnswer] | None:
        """The answers; None when the owner is no living incarnation, which the node must have said too."""
        answers = self.tell(event)
        if event.owner in self.alive and event.epoch == self.epochs[event.owner]:
            return answers
        assert self.refused(answers) == "stale_epoch"
        return None

    def holder(self, lease: str) -> str:
        held = self.leases.get(lease)
        return held.owner if held is not None and held.owner is not None else "p"

    def epoch(self, owner: str, older: int) -> int:
        return self.epochs.get(owner, 0) - older

    @staticmethod
    def refused(answers: list[PoolAnswer]) -> str:
        return answers[0].code if answers and isinstance(answers[0], Refused) else ""

    def num_on_ssd(self, keys: tuple[bytes, ...]) -> int:
        return 0

    def evict(self, keys: tuple[bytes, ...]) -> None:
        slots = {self.published.pop(key) for key in keys}
        self.leaving |= slots & {slot for _, slot in self.writing.values()}
        self.free |= slots - self.leaving

    def pinned(self) -> set[bytes]:
        return {key for lease in self.leases.values() for key in lease.keys}

    def kept(self) -> set[bytes]:
        """What must not be evicted."""
        return self.pinned()

    def givable(self, owner: str, held: ModelLease | None, slots: list[int]) -> bool:
        allowed = self.reserved[owner] | (held.private if held is not None else set())
        return len(set(slots)) == len(slots) and set(slots) <= allowed

    def give_back(self, owner: str, slots: list[int]) -> None:
        self.reserved[owner] -= set(slots)
        self.free |= set(slots)

    def close(self, lease: str) -> None:
        if lease in self.leases:
            self.free |= self.leases.pop(lease).private

    def bury(self, owner: str) -> None:
        for lease in [name for name, held in self.leases.items() if held.owner == owner]:
            self.close(lease)
        self.free |= self.reserved.pop(owner, set())
        self.alive.discard(owner)

    def expire(self) -> None:
        for lease in [n for n, held in self.leases.items() if held.owner is None and held.deadline_s <= self.now]:
            self.close(lease)


class SsdNodeMachine(NodeMachine):
    """The SSD holds fewer blocks than the paths have, so it evicts too; what it says is taken out of the answers in `tell`."""

    def __init__(self) -> None:
        super().__init__()
        self.node = PoolNode(NUM_SLOTS, ssd_slots=NUM_SSD_SLOTS, max_spilling=MAX_SPILLING)
        self.on_ssd: dict[bytes, int] = {}
        self.table: dict[int, bytes] = {}  # what a restart would find, by ssd slot
        self.excused: set[bytes] = set()  # blocks whose writes or reads have gone wrong or been overtaken
        self.spilled = self.loaded = 0

    def tell(self, event: PoolEvent) -> list[PoolAnswer]:
        answers = super().tell(event)
        left = {key for gone in answers if isinstance(gone, Removed) and gone.tier is Tier.DRAM for key in gone.keys}
        rest: list[PoolAnswer] = []
        for answer in answers:
            match answer:
                case Removed(keys=keys, tier=Tier.SSD, reason="evicted"):
                    for key in keys:
                        assert key not in self.published or key in left, "a copy of what DRAM holds was evicted"
                        assert self.on_ssd[key] not in self.being_read()
                        del self.on_ssd[key]
                case Removed(keys=keys, tier=Tier.SSD):
                    for key in keys:
                        del self.on_ssd[key]  # and its place may be taken by what comes next
                    rest.append(answer)
                case Stored(keys=(key,), tier=Tier.SSD):
                    assert isinstance(event, SpillDone)
                    assert key not in self.on_ssd
                    self.on_ssd[key] = event.ssd_slot  # and may be evicted by what comes next
                    rest.append(answer)
                case Spill():
                    self.take_spill(answer, event)
                case Erase(ssd_slots=ssd_slots):
                    assert not self.writing.keys() & set(ssd_slots), "a place is erased that is being written"
                    for ssd_slot in ssd_slots:
                        self.table.pop(ssd_slot, None)
                case _:
                    rest.append(answer)
        return rest

    def take_spill(self, spill: Spill, event: PoolEvent) -> None:
        assert spill.ssd_slot not in self.writing, "an ssd slot is written twice at a time"
        assert spill.ssd_slot not in self.on_ssd.values(), "a readable block is overwritten"
        assert spill.ssd_slot not in self.being_read(), "a block is overwritten while read"
        assert spill.slot not in {slot for _, slot in self.writing.values()}
        assert spill.depth == len(spill.key) - 1
        self.writing[spill.ssd_slot] = (spill.key, spill.slot)
        assert len(self.writing) <= MAX_SPILLING + isinstance(event, SpillDone)

    def being_read(self) -> set[int]:
        return {ssd_slot for load in self.loads.values() for ssd_slot in load.ssd_slots or ()}

    def known(self) -> set[bytes]:
        return super().known() | self.on_ssd.keys() | {key for key, _ in self.writing.values()}

    def forget(self, keys: tuple[bytes, ...], answers: list[PoolAnswer]) -> None:
        self.excused |= set(keys) - self.pinned()
        last = answers[-1] if answers else None
        if isinstance(last, Removed) and last.tier is Tier.SSD:
            assert set(last.keys) <= set(keys) - self.pinned()
            assert last.reason == "cleared"
            answers.pop()
        assert not {key for key in set(keys) & self.on_ssd.keys() - self.pinned() if self.on_ssd[key] not in self.being_read()}
        super().forget(keys, answers)

    def num_on_ssd(self, keys: tuple[bytes, ...]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self.on_ssd), len(keys))

    @precondition(lambda self: self.writing)
    @rule(which=st.integers(0, MAX_SPILLING - 1), ok=st.sampled_from([True, True, True, False]))
    def write_ends(self, which: int, ok: bool) -> None:
        ssd_slot = sorted(self.writing)[which % len(self.writing)]
        key, slot = self.writing.pop(ssd_slot)
        if ok:
            self.table[ssd_slot] = key  # else it is as it was
        answers = self.tell(SpillDone("body", 0, ssd_slot, ok))
        if slot in self.leaving:
            self.leaving.remove(slot)
            self.free.add(slot)
        if answers:
            assert (answers, ok) == ([Stored((key,), Tier.SSD)], True)
            self.spilled += 1
        else:
            self.excused.add(key)

    @rule(count=st.integers(1, 4))
    def all_writes_end_well(self, count: int) -> None:
        for _ in range(count * MAX_SPILLING):
            if self.writing:
                self.write_ends(0, True)

    def demote(self, owner: str, lease: str, path: bytes) -> None:
        """A prompt is computed, written out and evicted by the next ones."""
        if owner in self.alive and lease not in self.leases:
            self.prefill(owner, lease, path, 3)
            self.all_writes_end_well(2)
            self.release(owner, 0, lease, 0, None)
            self.reserve(owner, 0, NUM_SLOTS)
            self.revoke(owner, 0, sorted(self.reserved[owner]))

    @rule(ssd_slot=st.integers(-1, NUM_SSD_SLOTS))
    def a_write_that_never_began_ends(self, ssd_slot: int) -> None:
        if ssd_slot not in self.writing:
            assert self.refused(self.tell(SpillDone("body", 0, ssd_slot, True))) == "bad_slot"

    @rule(holder=HOLDERS, older=EPOCHS, lease=LEASES, skip=st.sampled_from([0, 0, 0, 1]))
    def start_load(self, holder: str | None, older: int, lease: str, skip: int) -> None:
        owner, held = holder or self.holder(lease), self.leases.get(lease)
        path, start = (held.path, len(held.slots) + skip) if held is not None else (b"aaaa", 0)
        keys = tuple(path[: i + 1] for i in range(start, len(path)))
        answers = self.ask(LoadStart(owner, self.epoch(owner, older), lease, keys))
        if answers is None or not self.may_load(answers, owner, lease):
            return
        *removed, answer = answers
        on_ssd = self.num_on_ssd(keys)
        self.make_room(removed, on_ssd)
        assert isinstance(answer, Loading)
        assert answer.ssd_slots == tuple(self.on_ssd[key] for key in keys[: len(answer.slots)])
        self.fill(owner, lease, keys[:on_ssd], answer.slots, answer.ssd_slots)
        if answer.slots:
            self.excused |= set(keys)

    @rule(lease=LEASES, failures=st.sets(st.integers(0, 3), max_size=2), publish=st.booleans())
    def load_ends(self, lease: str, failures: set[int], publish: bool) -> None:
        load = self.loads.get(lease)
        if load is None or load.ssd_slots is None:
            assert self.refused(self.tell(LoadDone("body", 0, lease))) == "unknown_lease"
            return
        if not failures:
            assert self.refused(self.tell(LoadDone("body", 0, lease, (NUM_SSD_SLOTS,)))) == "bad_slot"
        del self.loads[lease]
        failed = [(key, s) for i, (key, s) in enumerate(zip(load.keys, load.ssd_slots, strict=True)) if i in failures]
        lost = tuple(key for key, s in failed if self.on_ssd.get(key) == s)
        answers = self.tell(LoadDone("body", 0, lease, tuple(s for _, s in failed)))
        if lost:
            assert answers.pop(0) == Removed(lost, "failed", Tier.SSD)
        num_good = next((i for i in range(len(load.slots)) if i in failures), len(load.slots))
        self.loaded += num_good
        self.deliver(lease, load, num_good, answers, publish)

    @rule(lease=LEASES)
    def drop_what_is_being_read(self, lease: str) -> None:
        if lease in self.loads and self.alive:
            self.drop(min(self.alive), 0, self.loads[lease].lease.path, 0, 4)

    @rule(owner=OWNERS, lease=LEASES, path=PATHS, failures=st.sets(st.integers(0, 3), max_size=1), ends=st.booleans())
    def read_back(self, owner: str, lease: str, path: bytes, failures: set[int], ends: bool) -> None:
        """What a turn of a chat does whose blocks have left DRAM."""
        self.demote(owner, lease, path)
        if owner in self.alive and lease not in self.leases and lease not in self.loads:
            self.open_lease(owner, 0, lease, path)
            self.start_load(owner, 0, lease, 0)
            if ends or lease not in self.loads:
                self.load_ends(lease, failures, True)

    @invariant()
    def the_ssd_agrees_with_the_model(self) -> None:
        stats = self.node.stats()
        assert set(self.node.inventory(Tier.SSD)) == set(self.on_ssd)
        assert (stats.writing, stats.spilling) == (len(self.writing), len(self.leaving))
        assert stats.loading == sum(len(load.slots) for load in self.loads.values() if load.ssd_slots is not None)
        assert (stats.spilled, stats.loaded) == (self.spilled, self.loaded)
        total = stats.free + stats.reserved + stats.private + stats.published + stats.loading + stats.fetching + stats.spilling
        assert total == NUM_SLOTS

    @invariant()
    def a_restart_would_find_what_is_there_and_nothing_else(self) -> None:
        settled = {ssd_slot: key for ssd_slot, key in self.table.items() if ssd_slot not in self.writing}
        assert settled == {ssd_slot: key for key, ssd_slot in self.on_ssd.items()}

    @invariant()
    def no_suffix_is_alone_on_the_ssd(self) -> None:
        """As long as no write and no read of its sequence went wrong."""
        known = self.on_ssd.keys() | self.published.keys() | {key for key, _ in self.writing.values()} | self.excused
        for key in self.on_ssd:
            if len(key) > 1 and not {key[: i + 1] for i in range(len(key))} & self.excused:
                assert key[:-1] in known


TestNodeMachine = NodeMachine.TestCase
TestNodeMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)

TestSsdNodeMachine = SsdNodeMachine.TestCase
TestSsdNodeMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
