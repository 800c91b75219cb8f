"""Our decode rule number by number chooses as it does by columns."""

from random import Random

import pytest

from kvasir.core.commands import Candidate
from kvasir.core.events import InstanceInfo
from kvasir.core.request import Role
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.costs.quick import quick
from kvasir.pool.directory import BlockDirectory
from kvasir.scheduling.decode_choice import DecodeChoice, least_expected_tbt
from kvasir.scheduling.few import FewView, least_expected_tbt_of_few
from kvasir.scheduling.fleet import Fleet
from kvasir.scheduling.instance import Seat
from kvasir.scheduling.view import ClusterView

COSTS = quick(FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 1e-3, 1e-6), 0.0, 1e6))
STAYS_S = 10.0


def random_fleet(rng: Random) -> Fleet:
    fleet = Fleet(COSTS, rng.choice((None, 0.06)))
    fleet.answer_tokens = 400.0
    fleet.join(InstanceInfo("a", Role.PREFILL, "na", 1, 10_000, 8))
    for number in range(rng.randint(1, 4)):
        name = f"d{number}"
        fleet.join(InstanceInfo(name, rng.choice((Role.DECODE, Role.MIXED)), f"n{number}", 1, 10_000, 8))
        for index in range(rng.randint(0, 8)):
            fleet.sit(name, f"{name}-{index}", Seat(rng.randint(1, 20_000), rng.randint(1, 2000), 0.0, STAYS_S), 0.0)
            if rng.random() < 0.5:
                fleet.take_seat(name, f"{name}-{index}", 0.0)
        if fleet[name].info.role is Role.MIXED and rng.random() < 0.5:
            fleet.sent(name, f"p-{name}", seconds=1.0, tokens=1000, now=0.0, rank=0.0, due_s=30.0)
    return fleet


def both(fleet: Fleet, prefill: Candidate) -> tuple[DecodeChoice, DecodeChoice]:
    match = BlockDirectory().match(())
    few = FewView(
        fleet,
        match,
        num_prompt_tokens=1000,
        now=0.0,
        rank=0.0,
        due_s=30.0,
        tbt_s=0.1,
        costs=COSTS,
        kv_bytes_per_token=100,
        block_tokens=64,
        chunk_tokens=None,
        layerwise=True,
        max_stages=1,
    )
    columns = ClusterView(
        prefills=fleet.prefill_columns(match, block_tokens=64, now=0.0, rank=0.0, avoid=frozenset()),
        decodes=fleet.decode_columns(frozenset()),
        num_prompt_tokens=1000,
        best_tokens=0,
        source=None,
        costs=COSTS,
        kv_bytes_per_token=100,
        tbt_s=0.1,
    )
    return least_expected_tbt_of_few(few, prefill, 1100), least_expected_tbt(columns, prefill, 1100)


@pytest.mark.parametrize("seed", range(200))
def test_both_choose_the_same(seed: int) -> None:
    rng = Random(seed)
    fleet = random_fleet(rng)
    names = [instance.info.id for instance in fleet.prefillers]
    prefill = Candidate(rng.choice(names), rng.uniform(0.0, 15.0), 0.0, rng.choice((0.01, 1.0)), 0)
    by_numbers, by_columns = both(fleet, prefill)
    assert by_numbers.instance == by_columns.instance
    assert (by_numbers.batch, by_numbers.context_tokens, by_numbers.fits) == (
        by_columns.batch,
        by_columns.context_tokens,
        by_columns.fits,
    )
