"""Pins, priorities and watermarks, one rule at a time."""

from collections.abc import Iterator

import pytest

from kvasir.core.pool_events import (
    DropBlocks,
    Pin,
    Pinned,
    PoolAnswer,
    PoolTick,
    Priority,
    Removed,
    Reserved,
    SetQuota,
    SpillDone,
    Unpin,
)
from kvasir.pool.node import PoolNode
from tests.pool.test_node import A, B, C, D, Hand, refusal

E, F = (bytes([c]) * 16 for c in b"EF")


@pytest.fixture
def node() -> Iterator[PoolNode]:
    node = PoolNode(6)
    yield node
    node.check()


@pytest.fixture
def p(node: PoolNode) -> Hand:
    return Hand(node, "p")


def fill(p: Hand, *sequences: str) -> None:
    """Sequences of one block a letter, one after the other, idle."""
    for names in sequences:
        p.lease("w")
        p.put("w", **dict(zip(names, p.slots(len(names)), strict=True)))
        p.release("w")


def pin(
    p: Hand, *keys: bytes, until_s: float = 10.0, priority: Priority = Priority.NORMAL, now: float = 0.0
) -> list[PoolAnswer]:
    return p.node.handle(Pin(p.owner, p.epoch, keys, until_s, priority), 0.0)


def evicted(p: Hand, count: int) -> list[bytes]:
    """What goes, in order, when that many slots are needed one after the other."""
    gone: list[bytes] = []
    for _ in range(count):
        gone += [key for answer in p.reserve(1) if isinstance(answer, Removed) for key in answer.keys]
    return gone


def test_a_pinned_prefix_is_not_evicted_before_its_time(node: PoolNode, p: Hand) -> None:
    fill(p, "ABC", "DEF")
    assert pin(p, A, B, until_s=5.0) == [Pinned(2)]
    assert p.reserve(6) == [Removed((C, F, E, D), "evicted"), Reserved((3, 4, 5, 2))]
    assert node.handle(PoolTick("body", 0), 4.9) == []
    assert p.reserve(1) == [Reserved(())]
    node.handle(PoolTick("body", 0), 5.0)
    assert evicted(p, 2) == [B, A]


def test_what_is_not_here_or_does_not_begin_a_sequence_is_not_pinned(node: PoolNode, p: Hand) -> None:
    fill(p, "ABC")
    assert pin(p, A, D) == [Pinned(1)]
    assert pin(p, B, C) == [Pinned(0)]
    assert node.stats().pinned == 1


def test_no_more_than_half_of_the_pool_is_pinned(node: PoolNode, p: Hand) -> None:
    fill(p, "ABCD")
    assert refusal(pin(p, A, B, C, D)) == "pins_full"
    assert node.stats().pinned == 0
    assert pin(p, A, B, C) == [Pinned(3)]
    assert pin(p, A, B, C, until_s=20.0) == [Pinned(3)], "to renew takes no more"
    assert pin(p, A, B, C, D, until_s=0.0, priority=Priority.HIGH) == [Pinned(4)], "a priority is no pin"


def test_unpinning_stops_where_a_longer_sequence_is_pinned(node: PoolNode, p: Hand) -> None:
    fill(p, "AB")
    pin(p, A, B)
    node.handle(Unpin("p", 1, (A,)), 0.0)
    assert node.stats().pinned == 2
    node.handle(Unpin("p", 1, (A, B)), 0.0)
    assert node.stats().pinned == 0
    p.slots(4)
    assert evicted(p, 2) == [B, A]


def test_low_priority_goes_first_and_high_priority_last(node: PoolNode, p: Hand) -> None:
    fill(p, "AB", "CD", "EF")
    pin(p, A, B, until_s=0.0, priority=Priority.HIGH)
    pin(p, E, F, until_s=0.0, priority=Priority.LOW)
    assert evicted(p, 6) == [F, E, D, C, B, A]


def test_a_priority_counts_from_the_end_of_a_pin_on(node: PoolNode, p: Hand) -> None:
    fill(p, "AB", "CD", "EF")
    pin(p, E, F, until_s=5.0, priority=Priority.LOW)
    node.handle(PoolTick("body", 0), 5.0)
    assert evicted(p, 3) == [F, E, B]


def test_low_priority_ends_when_somebody_else_uses_the_block(node: PoolNode, p: Hand) -> None:
    fill(p, "AB", "CD")
    pin(p, A, B, until_s=0.0, priority=Priority.LOW)
    p.lease("r", A)
    p.put("r", E=p.slots(1)[0])
    p.release("r")
    p.slots(1)
    assert evicted(p, 5) == [B, D, C, E, A], "A stays as long as E does"


def test_a_part_that_others_use_as_well_gets_no_low_priority(node: PoolNode, p: Hand) -> None:
    fill(p, "ABCD")
    p.lease("r", A, B)
    p.release("r")
    pin(p, A, B, C, D, until_s=0.0, priority=Priority.LOW)
    fill(p, "EF")
    assert evicted(p, 6) == [D, C, B, A, F, E]


def test_dropping_a_block_ends_the_pins_of_what_follows_on_it(node: PoolNode, p: Hand) -> None:
    fill(p, "ABC")
    pin(p, A, B, C)
    node.handle(DropBlocks("p", 1, (B,)), 0.0)
    assert node.stats().pinned == 1
    p.slots(4)
    assert evicted(p, 2) == [C]


def test_below_the_low_watermark_a_tick_lets_go_of_what_the_ssd_has() -> None:
    node = PoolNode(6, ssd_slots=6, low_free=2, high_free=3)
    p = Hand(node, "p")
    fill(p, "ABC", "DE")
    for ssd_slot in (0, 1, 2):
        node.handle(SpillDone("body", 0, ssd_slot, True), 0.0)
    assert node.handle(PoolTick("body", 0), 1.0) == [Removed((C, B), "demoted")]
    assert node.handle(PoolTick("body", 0), 1.0) == [], "enough is free"
    assert node.stats().demotions == 2
    p.slots(3)
    assert node.handle(PoolTick("body", 0), 1.0) == [Removed((A,), "demoted")], "D and E are not written yet"
    node.check()
    assert evicted(p, 3) == [E, D]


def test_a_quota_is_no_negative_number(p: Hand) -> None:
    assert refusal(p.node.handle(SetQuota("p", 1, "t", -1), 0.0)) == "bad_quota"
