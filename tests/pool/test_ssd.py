"""The SSD tier of PoolNode, one rule at a time."""

from collections.abc import Iterator

import pytest

from kvasir.core.pool_events import (
    Clear,
    DropBlocks,
    Erase,
    Leased,
    LoadDone,
    Loaded,
    Loading,
    LoadStart,
    PoolAnswer,
    Removed,
    Reserved,
    Spill,
    SpillDone,
    SsdBlock,
    SsdFound,
    Stored,
)
from kvasir.core.tier import Tier
from kvasir.pool.node import PoolNode
from tests.pool.test_node import A, B, C, D, Hand, refusal


@pytest.fixture
def node() -> Iterator[PoolNode]:
    node = PoolNode(4, ssd_slots=4, max_spilling=2)
    yield node
    node.check()


@pytest.fixture
def p(node: PoolNode) -> Hand:
    return Hand(node, "p")


def done(node: PoolNode, ssd_slot: int, ok: bool = True) -> list[PoolAnswer]:
    return node.handle(SpillDone("body", 0, ssd_slot, ok), 0.0)


def load(hand: Hand, lease: str, *keys: bytes) -> list[PoolAnswer]:
    return hand.node.handle(LoadStart(hand.owner, hand.epoch, lease, keys), 0.0)


def loaded(node: PoolNode, lease: str, *failed: int) -> list[PoolAnswer]:
    return node.handle(LoadDone("body", 0, lease, failed), 0.0)


def fill_and_demote(node: PoolNode, p: Hand, names: str = "AB") -> None:
    """These blocks, in order, are on the SSD (in ssd slots from 0 on) and no longer in DRAM."""
    p.lease("w")
    p.put("w", **dict(zip(names, p.slots(len(names)), strict=True)))
    for ssd_slot in range(len(names)):
        done(node, ssd_slot)
    p.release("w")
    p.revoke(*p.slots(4))
    assert node.inventory() == ()


def test_a_published_block_is_written_at_once_in_order_and_so_many_at_a_time(node: PoolNode, p: Hand) -> None:
    p.lease("r")
    slots = p.slots(3)
    answers = p.put("r", **dict(zip("ABC", slots, strict=True)))
    assert answers == [Stored((A, B, C)), Spill(A, 0, 0, 0), Spill(B, 1, 1, 1)]
    assert done(node, 1) == [Stored((B,), Tier.SSD), Spill(C, 2, 2, 2)]
    assert node.stats().spills_waiting == 0


def test_what_dram_lets_go_of_can_still_be_read_from_the_ssd(node: PoolNode, p: Hand) -> None:
    fill_and_demote(node, p)
    assert set(node.inventory(Tier.SSD)) == {A, B}
    assert p.lease("r", A, B, C) == [Leased("r", (), 2)]
    assert node.stats().ssd_hits == 2


def test_what_was_not_written_when_dram_needs_the_space_is_dropped_and_counted(node: PoolNode, p: Hand) -> None:
    p.lease("r")
    p.put("r", **dict(zip("ABCD", p.slots(4), strict=True)))
    p.release("r")
    assert p.reserve(2) == [Removed((D, C), "evicted"), Reserved((2, 3))]
    assert (node.stats().dropped, node.stats().spills_waiting) == (2, 0)


def test_a_slot_that_is_being_written_out_is_given_to_nobody_until_it_is_written(node: PoolNode, p: Hand) -> None:
    p.lease("r")
    p.put("r", **dict(zip("ABCD", p.slots(4), strict=True)))
    p.release("r")
    assert p.reserve(4)[-1] == Reserved((2, 3)), "A and B are on their way out of slots 0 and 1"
    assert node.stats().spilling == 2
    assert done(node, 0) == [Stored((A,), Tier.SSD)]
    assert p.reserve(4) == [Reserved((0,))]


def test_a_write_that_fails_leaves_nothing_and_is_not_tried_again(node: PoolNode, p: Hand) -> None:
    p.lease("r")
    p.put("r", A=p.slots(1)[0])
    assert done(node, 0, ok=False) == [Erase((0,))]
    stats = node.stats()
    assert (stats.failed_spills, stats.ssd_free, stats.writing, stats.spills_waiting) == (1, 4, 0, 0)


def test_a_block_is_read_into_slots_of_its_lease_s_owner_and_published_by_it(node: PoolNode, p: Hand) -> None:
    fill_and_demote(node, p)
    p.lease("r", A, B)
    answer = load(p, "r", A, B)[-1]
    assert isinstance(answer, Loading)
    assert (len(answer.slots), answer.ssd_slots) == (2, (0, 1))
    assert loaded(node, "r") == [Loaded("r", answer.slots)]
    assert p.put("r", A=answer.slots[0], B=answer.slots[1]) == [Stored((A, B))]
    assert p.lease("r2", A, B) == [Leased("r2", answer.slots)]
    assert node.stats().spilled == 2, "what is on the SSD is not written again"


def test_a_corrupt_block_is_dropped_and_ends_what_was_loaded(node: PoolNode, p: Hand) -> None:
    fill_and_demote(node, p, "ABC")
    p.lease("r", A, B, C)
    answer = load(p, "r", A, B, C)[-1]
    assert isinstance(answer, Loading)
    assert loaded(node, "r", 1) == [Removed((B,), "failed", Tier.SSD), Loaded("r", answer.slots[:1]), Erase((1,))]
    stats = node.stats()
    assert (stats.loaded, stats.failed_loads, stats.reserved, stats.free) == (1, 1, 1, 3)
    assert p.lease("r2", A, B, C) == [Leased("r2", (), 1)]


def test_a_corrupt_block_that_another_reads_too_keeps_its_place_until_that_one_is_done(node: PoolNode, p: Hand) -> None:
    fill_and_demote(node, p, "A")
    for lease in ("r1", "r2"):
        p.lease(lease, A)
        load(p, lease, A)
    loaded(node, "r1", 0)
    assert (node.stats().ssd_published, node.stats().ssd_free) == (0, 3)
    assert loaded(node, "r2", 0) == [Loaded("r2", ())], "that A is gone has been said"
    assert node.stats().ssd_free == 4


def test_as_much_is_loaded_as_there_is_room_for(node: PoolNode, p: Hand) -> None:
    fill_and_demote(node, p, "ABC")
    p.slots(2)
    p.lease("r", A, B, C)
    answer = load(p, "r", A, B, C)[-1]
    assert isinstance(answer, Loading)
    assert (len(answer.slots), answer.ssd_slots) == (2, (0, 1))
    loaded(node, "r")


def test_nothing_to_load_is_an_empty_answer_that_needs_no_end(node: PoolNode, p: Hand) -> None:
    p.lease("r", A)
    assert load(p, "r", A) == [Loading("r", (), ())]
    assert refusal(loaded(node, "r")) == "unknown_lease"


def test_slots_that_a_read_still_fills_outlive_the_owner_that_asked(node: PoolNode, p: Hand) -> None:
    fill_and_demote(node, p)
    p.lease("r", A, B)
    load(p, "r", A, B)
    p.lost()
    assert (node.stats().loading, node.stats().free, node.stats().leases) == (2, 2, 0)
    assert loaded(node, "r") == []
    assert (node.stats().loading, node.stats().free) == (0, 4)


def test_a_lease_that_was_opened_again_does_not_get_the_old_one_s_load(node: PoolNode, p: Hand) -> None:
    fill_and_demote(node, p)
    p.lease("r", A)
    load(p, "r", A)
    p.release("r")
    p.lease("r", A)
    assert refusal(load(p, "r", A)) == "loading"
    assert loaded(node, "r") == []
    assert node.stats().free == 4


def test_only_the_holder_of_a_lease_may_load_for_it(node: PoolNode, p: Hand) -> None:
    p.lease("r", A)
    assert refusal(load(Hand(node, "d"), "r", A)) == "unknown_lease"


def test_ends_of_what_never_began_are_refused(node: PoolNode, p: Hand) -> None:
    fill_and_demote(node, p)
    assert refusal(done(node, 3)) == "bad_slot"
    assert refusal(done(node, 99)) == "bad_slot"
    p.lease("r", A)
    load(p, "r", A)
    assert refusal(loaded(node, "r", 1)) == "bad_slot"
    assert loaded(node, "r")


def test_the_ssd_evicts_what_dram_let_go_of_first_and_suffixes_before_prefixes() -> None:
    node = PoolNode(2, ssd_slots=2, max_spilling=2)
    p = Hand(node, "p")
    fill_and_demote(node, p)
    p.lease("r")
    slots = p.slots(2)
    answers = p.put("r", C=slots[0])
    assert answers == [Stored((C,)), Removed((B,), "evicted", Tier.SSD), Spill(C, slots[0], 1, 0)]
    done(node, 1)
    assert p.put("r", D=slots[1]) == [Stored((D,)), Removed((A,), "evicted", Tier.SSD), Spill(D, slots[1], 0, 1)]
    done(node, 0)
    assert set(node.inventory(Tier.SSD)) == {C, D}
    node.check()


def test_a_copy_of_what_dram_holds_is_not_evicted_and_a_full_ssd_lets_writes_wait() -> None:
    node = PoolNode(3, ssd_slots=1, max_spilling=2)
    p = Hand(node, "p")
    p.lease("r")
    p.put("r", A=p.slots(1)[0])
    done(node, 0)
    assert p.put("r", B=p.slots(1)[0]) == [Stored((B,))]
    assert (node.stats().spills_waiting, node.inventory(Tier.SSD)) == (1, (A,))
    node.check()


def test_what_an_earlier_run_left_is_readable_again(node: PoolNode, p: Hand) -> None:
    found = SsdFound("body", 0, (SsdBlock(B, 3, 1), SsdBlock(A, 1, 0)))
    assert node.handle(found, 0.0) == [Stored((B, A), Tier.SSD)]
    assert p.lease("r", A, B) == [Leased("r", (), 2)]
    assert refusal(node.handle(found, 0.0)) == "bad_slot"
    assert refusal(node.handle(SsdFound("body", 0, (SsdBlock(A, 0, 0),)), 0.0)) == "bad_slot"
    assert refusal(node.handle(SsdFound("body", 0, (SsdBlock(C, 0, 0), SsdBlock(C, 2, 0))), 0.0)) == "bad_slot"


def test_without_an_ssd_nothing_is_said_of_one() -> None:
    node = PoolNode(2)
    p = Hand(node, "p")
    p.lease("r")
    assert p.put("r", A=p.slots(1)[0]) == [Stored((A,))]
    assert p.lease("r2", A, B) == [Leased("r2", (0,))]
    assert load(p, "r2", B) == [Loading("r2", (), ())]
    assert refusal(done(node, 0)) == refusal(node.handle(SsdFound("body", 0, ()), 0.0)) == "bad_slot"
    assert (node.inventory(Tier.SSD), node.stats().ssd_slots) == ((), 0)


def test_a_dropped_block_is_gone_from_the_ssd_too_and_its_write_is_given_up(node: PoolNode, p: Hand) -> None:
    fill_and_demote(node, p)
    p.lease("r")
    p.put("r", C=p.slots(1)[0])
    p.release("r")
    said = node.handle(DropBlocks("p", 1, (B, C)), 0.0)
    assert said == [Removed((C,), "cleared"), Removed((B,), "cleared", Tier.SSD), Erase((1,))]
    assert node.stats().spilling == 1, "its slot is still read"
    assert done(node, 2) == [Erase((2,))], "or a restart would find what was deleted"
    assert (node.inventory(Tier.SSD), node.stats().free) == ((A,), 4)


def test_what_is_being_read_is_not_dropped(node: PoolNode, p: Hand) -> None:
    fill_and_demote(node, p)
    p.lease("r", A)
    load(p, "r", A)
    assert node.handle(Clear("p", 1), 0.0) == [Removed((B,), "cleared", Tier.SSD), Erase((1,))]
    loaded(node, "r")
    assert node.handle(Clear("p", 1), 0.0) == [Removed((A,), "cleared", Tier.SSD), Erase((0,))]
