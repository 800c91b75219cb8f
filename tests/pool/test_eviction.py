"""The eviction contract, over every policy that there is."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.pool.eviction import Eviction, Lru

POLICIES: list[Callable[[], Eviction]] = [Lru]


@pytest.fixture(params=POLICIES)
def eviction(request: pytest.FixtureRequest) -> Eviction:
    made: Eviction = request.param()
    return made


def test_nothing_to_evict_is_none(eviction: Eviction) -> None:
    assert eviction.victim(0.0) is None


def test_a_removed_block_is_no_victim(eviction: Eviction) -> None:
    eviction.add(1, 0, 0.0)
    eviction.add(2, 0, 0.0)
    eviction.remove(1)
    assert (eviction.victim(1.0), eviction.victim(1.0)) == (2, None)


def test_a_suffix_goes_before_its_prefix(eviction: Eviction) -> None:
    for slot, depth in ((7, 2), (5, 1), (3, 0)):
        eviction.add(slot, depth, 0.0)
    assert [eviction.victim(1.0) for _ in range(3)] == [7, 5, 3]


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "victim"]), st.integers(0, 5))))
@pytest.mark.parametrize("policy", POLICIES)
def test_it_holds_exactly_what_was_added_and_not_taken(policy: Callable[[], Eviction], steps: list[tuple[str, int]]) -> None:
    eviction = policy()
    held: set[int] = set()
    for now, (step, slot) in enumerate(steps):
        if step == "victim":
            victim = eviction.victim(now)
            assert (victim in held) if held else victim is None
            held.discard(-1 if victim is None else victim)
        elif (step == "add") != (slot in held):
            if step == "add":
                eviction.add(slot, 0, now)
                held.add(slot)
            else:
                eviction.remove(slot)
                held.remove(slot)
        assert len(eviction) == len(held)
        assert sorted(eviction) == sorted(held)


def test_lru_evicts_in_the_order_of_last_use() -> None:
    lru = Lru()
    for slot in (1, 2, 3):
        lru.add(slot, 0, 0.0)
    lru.remove(1)
    lru.add(1, 0, 1.0)
    assert [lru.victim(2.0) for _ in range(3)] == [2, 3, 1]
