"""PoolNode, one rule at a time."""

from collections.abc import Iterator

import pytest

from kvasir.core.errors import InvariantError
from kvasir.core.pool_events import (
    AdoptLease,
    Clear,
    DropBlocks,
    FetchDone,
    Fetching,
    FetchStart,
    KeyedSlot,
    LeaseBlocks,
    Leased,
    Loaded,
    OfferLease,
    OwnerJoined,
    OwnerLost,
    PoolAnswer,
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
from kvasir.pool.node import PoolNode
from kvasir.pool.policies import EVICTIONS

A, B, C, D = (bytes([c]) * 16 for c in b"ABCD")


class Hand:
    """Speaks to a node in the name of one owner; time stands still unless told otherwise."""

    def __init__(self, node: PoolNode, owner: str, epoch: int = 1):
        self.node, self.owner, self.epoch = node, owner, epoch
        self.join()

    def join(self) -> list[PoolAnswer]:
        return self.node.handle(OwnerJoined(self.owner, self.epoch), 0.0)

    def lost(self) -> list[PoolAnswer]:
        return self.node.handle(OwnerLost(self.owner, self.epoch), 0.0)

    def reserve(self, count: int) -> list[PoolAnswer]:
        return self.node.handle(PutStart(self.owner, self.epoch, count), 0.0)

    def slots(self, count: int) -> tuple[int, ...]:
        answer = self.reserve(count)[-1]
        assert isinstance(answer, Reserved)
        return answer.slots

    def put(self, lease: str, **blocks: int) -> list[PoolAnswer]:
        keyed = tuple(KeyedSlot(name.encode() * 16, slot) for name, slot in blocks.items())
        return self.node.handle(PutEnd(self.owner, self.epoch, lease, keyed), 0.0)

    def put_at_once(self, lease: str, *keys: bytes) -> tuple[tuple[int, ...], list[PoolAnswer]]:
        put = self.node.put_blocks(self.owner, self.epoch, lease, keys, 0.0)
        stored = [Stored(put.stored)] if put.stored else []
        return put.slots, [*put.before, *stored, *put.after]

    def revoke(self, *slots: int) -> list[PoolAnswer]:
        return self.node.handle(PutRevoke(self.owner, self.epoch, slots), 0.0)

    def lease(self, lease: str, *keys: bytes) -> list[PoolAnswer]:
        return self.node.handle(LeaseBlocks(self.owner, self.epoch, lease, keys), 0.0)

    def release(self, lease: str, *slots: int) -> list[PoolAnswer]:
        return self.node.handle(ReleaseLease(self.owner, self.epoch, lease, slots), 0.0)

    def offer(self, lease: str, *slots: int, deadline_s: float = 10.0) -> list[PoolAnswer]:
        return self.node.handle(OfferLease(self.owner, self.epoch, lease, slots, deadline_s), 0.0)

    def adopt(self, lease: str, now: float = 0.0) -> list[PoolAnswer]:
        return self.node.handle(AdoptLease(self.owner, self.epoch, lease), now)


@pytest.fixture
def node() -> Iterator[PoolNode]:
    node = PoolNode(4)
    yield node
    node.check()


@pytest.fixture
def p(node: PoolNode) -> Hand:
    return Hand(node, "p")


@pytest.fixture
def d(node: PoolNode) -> Hand:
    return Hand(node, "d")


def refusal(answers: list[PoolAnswer]) -> str:
    (answer,) = answers
    assert isinstance(answer, Refused)
    return answer.code


def test_slots_are_given_out_lowest_first_and_never_more_than_there_are(p: Hand) -> None:
    assert p.reserve(3) == [Reserved((0, 1, 2))]
    assert p.reserve(3) == [Reserved((3,))]
    assert p.reserve(1) == [Reserved(())]


def test_a_published_block_can_be_leased_by_its_key(p: Hand, d: Hand) -> None:
    p.slots(2)
    p.lease("r1")
    assert p.put("r1", A=0, B=1) == [Stored((A, B))]
    assert d.lease("r2", A, B, C) == [Leased("r2", (0, 1))]


def test_a_lease_covers_the_longest_published_prefix_only(p: Hand) -> None:
    p.slots(2)
    p.lease("r1")
    p.put("r1", A=0, C=1)
    assert p.lease("r2", A, B, C) == [Leased("r2", (0,))]


def test_reserving_evicts_what_nobody_leases_suffix_first(p: Hand) -> None:
    p.lease("r1")
    p.put("r1", **dict(zip("ABCD", p.slots(4), strict=True)))
    p.release("r1")
    p.lease("r2", A)
    assert p.reserve(2) == [Removed((D, C), "evicted"), Reserved((2, 3))]
    assert p.reserve(9) == [Removed((B,), "evicted"), Reserved((1,))]
    assert p.reserve(9) == [Reserved(())], "A is leased"


def test_a_key_that_is_published_already_keeps_its_first_slot(node: PoolNode, p: Hand, d: Hand) -> None:
    p.lease("r1")
    p.put("r1", A=p.slots(1)[0])
    d.lease("r2")
    assert d.put("r2", A=d.slots(1)[0], B=d.slots(1)[0]) == [Stored((B,))]
    assert p.lease("r3", A, B) == [Leased("r3", (0, 2))]
    assert (node.stats().private, node.stats().duplicates) == (1, 1)


def test_the_first_copy_of_a_duplicate_outlives_the_suffix_that_hangs_on_it(p: Hand, d: Hand) -> None:
    p.lease("r1")
    p.put("r1", A=p.slots(1)[0])
    d.lease("r2")
    d.put("r2", A=d.slots(1)[0], B=d.slots(1)[0])
    p.release("r1")
    assert p.reserve(9) == [Reserved((3,))], "d still works on the sequence that A begins"
    d.release("r2")
    assert p.reserve(2) == [Removed((B,), "evicted"), Reserved((2, 1))]


def test_a_hand_off_moves_every_slot_in_order(p: Hand, d: Hand) -> None:
    p.slots(3)
    p.lease("r1")
    p.put("r1", A=0)
    p.offer("r1", 1, 2)
    assert d.adopt("r1") == [Leased("r1", (0, 1, 2))]
    assert d.put("r1", B=1) == [Stored((B,))], "the adopted tail is published where it stands"
    assert p.lease("r2", A, B) == [Leased("r2", (0, 1))]


def test_an_adopted_tail_is_freed_with_its_lease_named_or_not(node: PoolNode, p: Hand, d: Hand) -> None:
    p.slots(3)
    p.lease("r1")
    p.offer("r1", 0, 1)
    d.adopt("r1")
    assert d.release("r1", 1) == []
    assert node.stats().free == 3


def test_an_offer_can_be_adopted_once(p: Hand, d: Hand) -> None:
    p.lease("r1")
    p.offer("r1")
    d.adopt("r1")
    assert refusal(p.adopt("r1")) == "unknown_lease"


def test_an_offer_outlives_the_death_of_its_giver(p: Hand, d: Hand) -> None:
    p.slots(2)
    p.lease("r1")
    p.offer("r1", 0)
    p.lost()
    assert d.adopt("r1") == [Leased("r1", (0,))]


def test_an_offer_that_nobody_adopts_expires(node: PoolNode, p: Hand, d: Hand) -> None:
    p.lease("r1")
    p.offer("r1", *p.slots(2), deadline_s=5.0)
    node.handle(PoolTick("hub", 0), 4.9)
    assert node.stats().private == 2
    node.handle(PoolTick("hub", 0), 5.0)
    assert (node.stats().free, node.stats().expired_offers) == (4, 1)
    assert refusal(d.adopt("r1")) == "unknown_lease"


def test_an_expired_offer_cannot_be_adopted_before_the_tick_either(p: Hand, d: Hand) -> None:
    p.lease("r1")
    p.offer("r1", deadline_s=5.0)
    assert refusal(d.adopt("r1", now=5.0)) == "unknown_lease"


def test_the_hub_may_withdraw_an_offer_but_close_no_lease(node: PoolNode, p: Hand) -> None:
    hub = Hand(node, "hub", 0)
    p.lease("r1")
    assert refusal(hub.release("r1")) == "unknown_lease"
    p.offer("r1", *p.slots(1))
    assert hub.release("r1") == []
    assert node.stats().free == 4


def test_a_dead_owner_s_reservations_and_leases_are_freed(node: PoolNode, p: Hand, d: Hand) -> None:
    p.slots(2)
    p.lease("r1")
    p.put("r1", A=0)
    p.lost()
    assert (node.stats().free, node.stats().published, node.stats().leased) == (3, 1, 0)
    assert d.lease("r2", A) == [Leased("r2", (0,))], "what it published stays"


def test_a_new_incarnation_frees_what_the_old_one_held(node: PoolNode, p: Hand) -> None:
    p.slots(2)
    p.lease("r1")
    reborn = Hand(node, "p", 2)
    assert (node.stats().free, node.stats().leases) == (4, 0)
    assert refusal(p.reserve(1)) == "stale_epoch"
    assert reborn.reserve(1) == [Reserved((1,))], "the warmest slot first"


def test_joining_twice_changes_nothing(node: PoolNode, p: Hand) -> None:
    p.slots(2)
    assert p.join() == []
    assert node.stats().reserved == 2


def test_late_messages_of_a_dead_incarnation_are_refused(node: PoolNode, p: Hand) -> None:
    p.lost()
    for answers in (p.reserve(1), p.lease("r1"), p.join()):
        assert refusal(answers) == "stale_epoch"
    assert p.lost() == [], "that it is dead may be said twice"


def test_the_death_of_an_old_incarnation_does_not_touch_the_new_one(node: PoolNode, p: Hand) -> None:
    reborn = Hand(node, "p", 2)
    reborn.slots(2)
    assert refusal(p.lost()) == "stale_epoch"
    assert node.stats().reserved == 2


def test_an_owner_that_died_before_its_first_message_arrived_cannot_join(node: PoolNode) -> None:
    node.handle(OwnerLost("x", 1), 0.0)
    assert refusal(Hand(node, "x", 1).reserve(1)) == "stale_epoch"


def test_nobody_can_ask_before_joining(node: PoolNode) -> None:
    assert refusal(node.handle(PutStart("stranger", 1, 1), 0.0)) == "stale_epoch"


@pytest.mark.parametrize("slots", [(1,), (0, 1), (0, 0), (99,), (-1,)])
def test_slots_that_the_owner_did_not_reserve_are_refused_and_nothing_changes(
    node: PoolNode, p: Hand, d: Hand, slots: tuple[int, ...]
) -> None:
    p.slots(1)
    d.slots(1)
    p.lease("r1")
    before = (node.stats().free, node.stats().reserved, node.stats().private)
    keyed = tuple(KeyedSlot(bytes([i]), slot) for i, slot in enumerate(slots))
    assert refusal(p.revoke(*slots)) == "bad_slot"
    assert refusal(p.release("r1", *slots)) == "bad_slot"
    assert refusal(p.offer("r1", *slots)) == "bad_slot"
    assert refusal(node.handle(PutEnd("p", 1, "r1", keyed), 0.0)) == "bad_slot"
    assert (node.stats().free, node.stats().reserved, node.stats().private) == before
    assert p.lease("r2", bytes([0])) == [Leased("r2", ())]


def test_a_lease_that_another_holds_cannot_be_written_offered_or_released(p: Hand, d: Hand) -> None:
    p.lease("r1")
    slot = d.slots(1)[0]
    assert refusal(d.put("r1", A=slot)) == "unknown_lease"
    assert refusal(d.offer("r1", slot)) == "unknown_lease"
    assert refusal(d.release("r1")) == "unknown_lease"
    assert refusal(d.lease("r1")) == "lease_exists"


def test_releasing_twice_is_ignored(node: PoolNode, p: Hand) -> None:
    p.lease("r1")
    p.slots(1)
    assert p.release("r1", 0) == []
    assert p.release("r1") == []
    assert node.stats().free == 4


def test_hits_are_counted_in_blocks(node: PoolNode, p: Hand) -> None:
    p.lease("r1")
    p.put("r1", A=p.slots(1)[0])
    p.lease("r2", A, B)
    assert (node.stats().lookups, node.stats().hits) == (2, 1)


def test_check_tells_what_is_broken_and_what_happened() -> None:
    node = PoolNode(2)
    hand = Hand(node, "p")
    hand.slots(1)
    node._slots.free.append(0)
    with pytest.raises(InvariantError, match=r"(?s)number of places: \{0: 2\}.*PutStart\(owner='p'"):
        node.check()


def fetch(hand: Hand, lease: str, count: int) -> list[PoolAnswer]:
    return hand.node.handle(FetchStart(hand.owner, hand.epoch, lease, count), 0.0)


def fetched(node: PoolNode, lease: str, num_good: int) -> list[PoolAnswer]:
    return node.handle(FetchDone("messenger", 0, lease, num_good), 0.0)


def test_blocks_of_another_node_are_fetched_into_slots_that_their_owner_publishes(node: PoolNode, p: Hand) -> None:
    p.lease("r", A, B)
    assert fetch(p, "r", 2) == [Fetching("r", (0, 1))]
    assert node.stats().fetching == 2
    assert fetched(node, "r", 2) == [Loaded("r", (0, 1))]
    assert p.put("r", A=0, B=1) == [Stored((A, B))]
    assert node.stats().fetched == 2


def test_a_fetch_that_fails_half_way_gives_the_rest_back(node: PoolNode, p: Hand) -> None:
    p.lease("r", A, B, C)
    fetch(p, "r", 3)
    assert fetched(node, "r", 1) == [Loaded("r", (0,))]
    stats = node.stats()
    assert (stats.free, stats.reserved, stats.fetched, stats.failed_fetches) == (3, 1, 1, 2)


def test_slots_being_fetched_into_outlive_the_owner_that_asked(node: PoolNode, p: Hand) -> None:
    p.lease("r", A)
    fetch(p, "r", 3)
    p.lost()
    other = Hand(node, "d")
    assert other.reserve(4) == [Reserved((3,))]
    assert fetched(node, "r", 3) == []
    assert node.stats().free == 3


def test_a_late_fetch_is_not_for_a_later_lease_of_the_same_name(node: PoolNode, p: Hand) -> None:
    p.lease("r", A)
    fetch(p, "r", 1)
    p.release("r")
    p.lease("r", B)
    assert refusal(fetch(p, "r", 1)) == "loading"
    assert fetched(node, "r", 1) == []
    assert fetch(p, "r", 1) == [Fetching("r", (0,))]
    fetched(node, "r", 0)


def test_a_fetch_evicts_as_needed_and_an_empty_one_needs_no_end(node: PoolNode, p: Hand) -> None:
    p.lease("w")
    p.put("w", A=p.slots(1)[0])
    p.release("w")
    slots = p.slots(3)
    p.lease("r", B)
    assert fetch(p, "r", 2) == [Removed((A,), "evicted"), Fetching("r", (0,))]
    fetched(node, "r", 0)
    p.reserve(1)
    assert fetch(p, "r", 2) == [Fetching("r", ())]
    assert refusal(fetched(node, "r", 0)) == "unknown_lease"
    p.revoke(*slots)


def test_dropped_blocks_are_gone_unless_they_are_leased(node: PoolNode, p: Hand) -> None:
    p.lease("w")
    p.put("w", **dict(zip("ABC", p.slots(3), strict=True)))
    p.release("w")
    p.lease("r", A)
    assert node.handle(DropBlocks("p", 1, (A, B, B, D)), 0.0) == [Removed((B,), "cleared")]
    assert node.handle(Clear("p", 1), 0.0) == [Removed((C,), "cleared")]
    assert node.inventory() == (A,)
    assert refusal(node.handle(Clear("p", 0), 0.0)) == "stale_epoch"


def test_blocks_put_at_once_are_reserved_and_published_by_one_call(node: PoolNode, p: Hand, d: Hand) -> None:
    p.lease("x")
    assert p.put_at_once("x", A, B) == ((0, 1), [Stored((A, B))])
    d.lease("y")
    assert d.put_at_once("y", A, C) == ((2, 3), [Stored((C,))])  # A is published already: its copy stays private
    p.release("x")
    d.release("y")
    assert node.inventory() == (A, B, C)


def test_blocks_put_at_once_get_the_room_that_there_is(p: Hand, d: Hand) -> None:
    p.lease("x")
    p.put_at_once("x", A, B, C)
    d.lease("y")
    assert d.put_at_once("y", D, D[:8] + A[:8]) == ((3,), [Stored((D,))])
    assert d.put_at_once("y", D[:8] + A[:8]) == ((), [])
    p.release("x")
    assert d.put_at_once("y", D[:8] + A[:8]) == ((2,), [Removed((C,), "evicted"), Stored((D[:8] + A[:8],))])


@pytest.mark.parametrize("policy", EVICTIONS)
def test_a_block_named_twice_is_put_once(policy: str) -> None:
    node = PoolNode(4, EVICTIONS[policy](lambda depth: 1.0 + depth))
    p = Hand(node, "p")
    p.lease("x")
    assert p.put_at_once("x", A, A, B) == ((0, 1, 2), [Stored((A, B))])
    p.release("x")
    node.check()
    p.lease("y", A, B)
    p.release("y")
    node.check()
    assert node.inventory() == (A, B)


def test_nothing_is_put_at_once_under_the_lease_of_another(p: Hand, d: Hand) -> None:
    p.lease("x")
    assert refusal(d.put_at_once("x", A)[1]) == "unknown_lease"
