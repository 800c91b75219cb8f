"""Who of many is looked at: those that are first by any plan."""

import pytest

from kvasir.core.events import InstanceInfo
from kvasir.core.request import Role
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.costs.quick import quick
from kvasir.pool.directory import BlockDirectory
from kvasir.scheduling import contenders, few
from kvasir.scheduling.few import FewView
from kvasir.scheduling.fleet import Fleet
from kvasir.scheduling.instance import Seat

COSTS = quick(FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 1e-3, 0.0), 0.0, 1e6))
KEYS = tuple(number.to_bytes(16, "big") for number in range(9))
BLOCK_TOKENS = 100


def looked_at(fleet: Fleet, directory: BlockDirectory, *, layerwise: bool, kv_bytes: int) -> list[str]:
    """For a prompt of 1,000 tokens, which takes 1 s to compute, 0.1 s behind nine blocks of prefix."""
    view = FewView(
        fleet,
        tbt_s=0.1,
        costs=COSTS,
        kv_bytes_per_token=kv_bytes,
        block_tokens=BLOCK_TOKENS,
        chunk_tokens=None,
        layerwise=layerwise,
        max_stages=1,
    )
    view.look(directory.match(KEYS), num_prompt_tokens=1000, now=0.0, rank=0.0, due_s=30.0)
    assert not view.is_whole
    assert view.num_prefillers == len(fleet.prefillers)
    return [known.instance.id for known in view.prefillers]


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """p0 to p4 are free in 0.5 to 0.9 s, m at once, but it prefills half of the time."""
    monkeypatch.setattr(few, "FEW", 0)
    fleet = Fleet(COSTS, 0.064)
    for number in range(5):
        fleet.join(InstanceInfo(f"p{number}", Role.PREFILL, f"n{number}", 1, 10_000, 8))
        fleet.sent(f"p{number}", "r", seconds=0.5 + 0.1 * number, tokens=1, now=0.0, rank=0.0, due_s=30.0)
    fleet.join(InstanceInfo("m", Role.MIXED, "nm", 1, 10_000, 64))
    for number in range(21):
        fleet.sit("m", str(number), Seat(1, 1, 0.0, 10.0), 0.0)
        fleet.take_seat("m", str(number), 0.0)
    assert fleet["m"].book.pace == pytest.approx(0.5, abs=0.01)
    return fleet


def holding(*nodes: str) -> BlockDirectory:
    directory = BlockDirectory()
    for node in nodes:
        directory.stored(node, 1, KEYS)
    return directory


def test_without_a_prefix_those_who_will_have_computed_it_first(fleet: Fleet) -> None:
    assert looked_at(fleet, holding(), layerwise=True, kv_bytes=1) == ["p0", "p1", "p2"]


def test_with_a_prefix_those_who_have_it_and_those_who_will_have_fetched_it_first(fleet: Fleet) -> None:
    assert looked_at(fleet, holding("n4"), layerwise=True, kv_bytes=1) == ["m", "p0", "p1", "p2", "p4"]


def test_a_wait_that_hides_the_transfer_counts_for_nothing(fleet: Fleet) -> None:
    """The transfer takes 0.9 s: who is free sooner waits for it."""
    assert looked_at(fleet, holding("n4"), layerwise=True, kv_bytes=1000) == ["p0", "p1", "p2", "p4"]
    assert looked_at(fleet, holding("n4"), layerwise=False, kv_bytes=1000) == ["m", "p0", "p1", "p2", "p4"]


def test_of_many_who_have_it_the_first(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "FEW_NODES", 2)
    everyone = holding("n0", "n1", "n2", "n3", "nm")
    assert looked_at(fleet, everyone, layerwise=True, kv_bytes=1) == ["m", "p0", "p1", "p4"]
