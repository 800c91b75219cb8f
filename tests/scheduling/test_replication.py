"""Copies of hot prefixes."""

import pytest

from kvasir.core.commands import Candidate, Replicate
from kvasir.core.events import InstanceInfo
from kvasir.core.request import Role
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.pool.directory import BlockDirectory
from kvasir.scheduling.fleet import Fleet
from kvasir.scheduling.replication import CONGESTED, MAX_COPIES, WINDOW_S, HotPrefixes

COSTS = FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 0.0, 1e-6), 0.0, 1e6)
KEYS = (b"a" * 16, b"b" * 16)


@pytest.fixture
def fleet() -> Fleet:
    made = Fleet(COSTS)
    for index in range(6):
        made.join(InstanceInfo(f"i{index}", Role.PREFILL, f"n{index}", 1, 10_000, 8))
    return made


@pytest.fixture
def directory() -> BlockDirectory:
    made = BlockDirectory()
    made.stored("n0", 1, KEYS)
    return made


def fetch(tokens: int = 1000, instance: str = "i1") -> Candidate:
    return Candidate(instance, 0.0, 0.1, 1.0, tokens, tokens, "n0")


def seconds(tokens: int) -> float:
    return tokens * 1e-3


def test_a_source_that_sends_seldom_is_left_alone(fleet: Fleet, directory: BlockDirectory) -> None:
    rule = HotPrefixes(seconds)
    assert all(rule.placed(KEYS, fetch(), fleet, directory, now) == [] for now in (0.0, 100.0, 200.0, 300.0, 400.0))


def test_a_congested_source_gives_its_hot_prefix_to_the_instance_with_the_least_to_do(
    fleet: Fleet, directory: BlockDirectory
) -> None:
    fleet.sent("i2", "r", seconds=1.0, tokens=1000, now=0.0, rank=0.0, due_s=30.0)
    rule = HotPrefixes(seconds)
    needed = int(CONGESTED * WINDOW_S)
    assert [rule.placed(KEYS, fetch(), fleet, directory, 0.0) for _ in range(needed - 1)] == [[]] * (needed - 1)
    assert rule.placed(KEYS, fetch(), fleet, directory, 0.0) == [Replicate("n0", "n3", KEYS)]  # n1 fetched, i2 is busy
    assert rule.placed(KEYS, fetch(), fleet, directory, 0.5) == []  # that copy is still under way
    assert rule.placed(KEYS, fetch(), fleet, directory, 1.0) != []


def test_copies_are_bounded(fleet: Fleet, directory: BlockDirectory) -> None:
    for index in range(1, MAX_COPIES):
        directory.stored(f"n{index}", 1, KEYS)
    rule = HotPrefixes(seconds)
    assert all(rule.placed(KEYS, fetch(instance="i5"), fleet, directory, 0.0) == [] for _ in range(20))


def test_what_was_not_fetched_says_nothing(fleet: Fleet, directory: BlockDirectory) -> None:
    rule = HotPrefixes(seconds)
    local = Candidate("i0", 0.0, 0.0, 1.0, 1000)
    assert all(rule.placed(KEYS, local, fleet, directory, 0.0) == [] for _ in range(20))
