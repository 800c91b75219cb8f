"""The eviction contract, over every policy that there is, and what each of them prefers."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.costs.roofline import reference_cost
from kvasir.pool.cost_aware import CostAware, block_seconds
from kvasir.pool.eviction import Block, Eviction, Lru
from kvasir.pool.frequency import LengthAware, Lfu
from kvasir.pool.ghosts import FORGOTTEN_AT_ONCE, MIN_GHOSTS, Ghosts
from kvasir.pool.policies import EVICTIONS
from kvasir.pool.replay import CacheReplay

SECONDS = block_seconds(reference_cost(), 512)


def block(name: int, depth: int = 0, uses: int = 1) -> Block:
    return Block(bytes([0, name]) * 8, name, depth, depth, uses=uses)


class OneByOne:
    """An eviction policy that is told of a single block at a time, by its slot."""

    def __init__(self, many: Eviction):
        self.many = many
        self.blocks: dict[int, Block] = {}

    def add(self, slot: int, block: Block, now: float) -> None:
        block.slot = slot
        self.blocks[slot] = block
        self.many.add([block], now)

    def remove(self, slot: int, now: float) -> None:
        self.many.remove([self.blocks[slot]], now)

    def forget(self, slot: int, now: float) -> None:
        self.many.forget(self.blocks[slot], now)

    def victim(self, now: float) -> int | None:
        victims = self.many.victims(1, now)
        return victims[0].slot if victims else None

    def __len__(self) -> int:
        return len(self.many)

    def __iter__(self) -> Iterator[int]:
        return iter([block.slot for block in self.many])


def made(policy: str) -> OneByOne:
    return OneByOne(EVICTIONS[policy](SECONDS))


@pytest.fixture(params=EVICTIONS)
def eviction(request: pytest.FixtureRequest) -> OneByOne:
    return made(request.param)


def test_nothing_to_evict_is_none(eviction: OneByOne) -> None:
    assert eviction.victim(0.0) is None


def test_a_removed_block_is_no_victim(eviction: OneByOne) -> None:
    eviction.add(1, block(1), 0.0)
    eviction.add(2, block(2), 0.0)
    eviction.remove(1, 0.5)
    assert (eviction.victim(1.0), eviction.victim(1.0)) == (2, None)


def test_a_suffix_goes_before_its_prefix(eviction: OneByOne) -> None:
    for slot, depth in ((7, 2), (5, 1), (3, 0)):
        eviction.add(slot, block(slot, depth), 0.0)
    assert [eviction.victim(1.0) for _ in range(3)] == [7, 5, 3]


def test_a_forgotten_block_is_no_victim_and_another_may_come_into_its_slot(eviction: OneByOne) -> None:
    eviction.add(1, block(1), 0.0)
    eviction.add(2, block(2), 0.0)
    eviction.forget(1, 0.5)
    assert list(eviction) == [2]
    eviction.add(1, block(3), 1.0)
    assert {eviction.victim(2.0), eviction.victim(2.0)} == {1, 2}


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "forget", "victim"]), st.integers(0, 5), st.integers(1, 9))))
@pytest.mark.parametrize("policy", EVICTIONS)
def test_it_holds_exactly_what_was_added_and_not_taken(policy: str, steps: list[tuple[str, int, int]]) -> None:
    eviction = made(policy)
    held: set[int] = set()
    for now, (step, slot, uses) in enumerate(steps):
        if step == "victim":
            victim = eviction.victim(now)
            assert (victim in held) if held else victim is None
            held.discard(-1 if victim is None else victim)
        elif (step == "add") != (slot in held):
            if step == "add":
                eviction.add(slot, block(slot, slot, uses), now)
                held.add(slot)
            else:
                (eviction.remove if step == "remove" else eviction.forget)(slot, now)
                held.remove(slot)
        assert len(eviction) == len(held)
        assert sorted(eviction) == sorted(held)


PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=60)
GAPS = st.sampled_from([0.0, 0.1, 3.0, 700.0])


@settings(max_examples=150, deadline=None)
@given(paths=PATHS, gap=GAPS, num_slots=st.integers(1, 12))
@pytest.mark.parametrize("policy", EVICTIONS)
def test_no_suffix_stays_without_its_prefix(policy: str, paths: list[list[int]], gap: float, num_slots: int) -> None:
    """Keys spell out the path to their block; two requests overlap, so that prefixes are released later than suffixes."""
    cache = CacheReplay(num_slots, made(policy).many).slots
    open_leases: list[list[Block]] = []
    for number, path in enumerate(paths):
        now = gap * number
        keys = [b"\0" + bytes(path[: depth + 1]) for depth in range(len(path))]
        pinned = cache.pin_prefix(keys, now)
        for slot in cache.take(len(keys) - len(pinned), now)[0]:
            pinned.append(cache.publish(keys[len(pinned)], slot, len(pinned), now))
        open_leases.append(pinned)
        if len(open_leases) > 1:
            cache.unpin(open_leases.pop(number % 2), now)
        assert all(len(key) == 2 or key[:-1] in cache.index for key in cache.index)
        assert list(cache.problems()) == []


def test_lru_evicts_in_the_order_of_last_use() -> None:
    lru = OneByOne(Lru())
    for slot in (1, 2, 3):
        lru.add(slot, block(slot), 0.0)
    lru.remove(1, 1.0)
    lru.add(1, block(1), 1.0)
    assert [lru.victim(2.0) for _ in range(3)] == [2, 3, 1]


@pytest.mark.parametrize("policy", ["lfu", "cost-aware"])
def test_a_block_that_was_used_more_stays_longer(policy: str) -> None:
    eviction = made(policy)
    eviction.add(1, block(1, uses=9), 0.0)
    eviction.add(2, block(2), 0.0)
    assert [eviction.victim(1.0) for _ in range(2)] == [2, 1]


def test_lfu_remembers_the_uses_of_a_block_that_comes_back() -> None:
    lfu = OneByOne(Lfu())
    lfu.add(1, block(1, uses=5), 0.0)
    assert lfu.victim(1.0) == 1
    lfu.add(4, block(1), 2.0)
    lfu.add(2, block(2, uses=3), 3.0)
    assert [lfu.victim(4.0) for _ in range(2)] == [2, 4]


def test_of_equal_use_the_length_aware_cache_evicts_the_deeper_block() -> None:
    aware = OneByOne(LengthAware())
    aware.add(1, block(1, depth=9), 5.0)
    aware.add(2, block(2, depth=3), 0.0)
    aware.add(3, block(3, depth=99, uses=2), 0.0)
    assert [aware.victim(6.0) for _ in range(3)] == [1, 2, 3]


def test_of_equal_chance_cost_aware_keeps_what_takes_longer_to_compute() -> None:
    aware = OneByOne(CostAware(lambda depth: 1.0 + depth))
    aware.add(1, block(1, depth=30), 0.0)
    aware.add(2, block(2, depth=1), 0.0)
    assert [aware.victim(1.0) for _ in range(2)] == [2, 1]


def test_cost_aware_learns_that_blocks_used_once_do_not_come_back() -> None:
    aware = OneByOne(CostAware(lambda _: 1.0))
    for number in range(20_000):
        once, often = number.to_bytes(8, "little") * 2, bytes([0, number % 8]) * 8
        aware.add(number % 1000, Block(once, 0, 0, 0, uses=1), float(number))
        if number >= 8:
            aware.remove(1000 + number % 8, float(number))
        aware.add(1000 + number % 8, Block(often, 0, 0, 0, uses=2), float(number))
        if number % 1000 == 999:
            for _ in range(1000):
                victim = aware.victim(float(number))
                if number > 10_000:
                    assert victim is not None
                    assert victim < 1000, "the blocks that are used all the time stay"
                elif victim is not None and victim >= 1000:
                    aware.add(victim, Block(bytes([0, victim - 1000]) * 8, 0, 0, 0, uses=2), float(number))


def test_ghosts_are_bounded_and_the_oldest_is_forgotten_first() -> None:
    ghosts: Ghosts[int] = Ghosts()
    for number in range(MIN_GHOSTS + 1):
        ghosts.leave(number.to_bytes(4, "big"), number)
        ghosts.trim(1)
    assert len(ghosts) == MIN_GHOSTS + 1 - MIN_GHOSTS // FORGOTTEN_AT_ONCE
    first = (MIN_GHOSTS // FORGOTTEN_AT_ONCE).to_bytes(4, "big")
    assert (ghosts.recall(bytes(4)), ghosts.recall(first), ghosts.recall(first)) == (
        None,
        MIN_GHOSTS // FORGOTTEN_AT_ONCE,
        None,
    )
