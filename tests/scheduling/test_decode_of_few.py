"""Our decode rule number by number, and among many by a bound, chooses as it does by columns."""

from random import Random

import pytest

from kvasir.core.commands import Candidate
from kvasir.core.events import InstanceInfo
from kvasir.core.request import Role
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.costs.quick import QuickCosts, quick
from kvasir.pool.directory import BlockDirectory
from kvasir.scheduling import many
from kvasir.scheduling.decode_choice import DecodeChoice, least_expected_tbt
from kvasir.scheduling.few import FewView, least_expected_tbt_of_few
from kvasir.scheduling.fleet import Fleet
from kvasir.scheduling.instance import Seat
from kvasir.scheduling.many import least_expected_tbt_of_many
from kvasir.scheduling.view import ClusterView

COSTS = quick(FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 1e-3, 1e-6), 0.0, 1e6))
FLAT = quick(FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 0.0, 0.0), 0.0, 1e6))
"""All steps take equally long: of equals the first is chosen."""

STAYS_S = 10.0


def random_fleet(rng: Random, most: int = 4, costs: QuickCosts = COSTS) -> Fleet:
    fleet = Fleet(costs, rng.choice((None, 0.06)))
    fleet.answer_tokens = 400.0
    fleet.join(InstanceInfo("a", Role.PREFILL, "na", 1, 10_000, 8))
    for number in range(rng.randint(1, most)):
        name = f"d{number:02}"
        fleet.join(InstanceInfo(name, rng.choice((Role.DECODE, Role.MIXED)), f"n{number}", 1, 10_000, 8))
        for index in range(rng.randint(0, 8)):
            fleet.sit(name, f"{name}-{index}", Seat(rng.randint(1, 20_000), rng.randint(1, 2000), 0.0, STAYS_S), 0.0)
            if rng.random() < 0.5:
                fleet.take_seat(name, f"{name}-{index}", 0.0)
        if fleet[name].info.role is Role.MIXED and rng.random() < 0.5:
            fleet.sent(name, f"p-{name}", seconds=1.0, tokens=1000, now=0.0, rank=0.0, due_s=30.0)
    return fleet


def by_numbers(fleet: Fleet, prefill: Candidate) -> DecodeChoice:
    view = FewView(
        fleet,
        tbt_s=0.1,
        costs=COSTS,
        kv_bytes_per_token=100,
        block_tokens=64,
        chunk_tokens=None,
        layerwise=True,
        max_stages=1,
        stages_on_one_node=False,
        policy=None,
    )
    view.look(BlockDirectory().match(()), num_prompt_tokens=1000, now=0.0, rank=0.0, due_s=30.0)
    return least_expected_tbt_of_few(view, prefill, 1100)


def columns_of(fleet: Fleet, costs: QuickCosts = COSTS) -> ClusterView:
    match = BlockDirectory().match(())
    return ClusterView(
        prefills=fleet.prefill_columns(match, block_tokens=64, now=0.0, rank=0.0, avoid=frozenset()),
        decodes=fleet.decode_columns(frozenset()),
        num_prompt_tokens=1000,
        best_tokens=0,
        source=None,
        costs=costs,
        kv_bytes_per_token=100,
        tbt_s=0.1,
    )


def random_prefill(fleet: Fleet, rng: Random) -> Candidate:
    names = [instance.info.id for instance in fleet.prefillers]
    return Candidate(rng.choice(names), rng.uniform(0.0, 15.0), 0.0, rng.choice((0.01, 1.0)), 0)


def said(choice: DecodeChoice) -> tuple[str, float, int, int, bool, int]:
    return choice.instance, choice.tbt_s, choice.batch, choice.context_tokens, choice.fits, choice.ahead


@pytest.mark.parametrize("seed", range(200))
def test_a_few_choose_as_columns_do(seed: int) -> None:
    rng = Random(seed)
    fleet = random_fleet(rng)
    prefill = random_prefill(fleet, rng)
    assert said(by_numbers(fleet, prefill)) == said(least_expected_tbt(columns_of(fleet), prefill, 1100))


@pytest.mark.parametrize("most_asked", [3, 100])
@pytest.mark.parametrize("costs", [COSTS, FLAT])
@pytest.mark.parametrize("seed", range(100))
def test_many_choose_as_columns_do_whether_or_not_they_give_up(
    seed: int, costs: QuickCosts, most_asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "MOST_ASKED", most_asked)
    rng = Random(seed)
    fleet = random_fleet(rng, 50, costs)
    fleet.ttft_s = rng.choice((0.0, 2.0))
    view = columns_of(fleet, costs)
    for prefill in [random_prefill(fleet, rng) for _ in range(5)]:
        of_many = least_expected_tbt_of_many(fleet, view, prefill, 1100)
        assert said(of_many) == said(least_expected_tbt(view, prefill, 1100))
