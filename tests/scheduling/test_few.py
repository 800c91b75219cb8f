"""Placing number by number, and among those of many that can be best, decides what placing by columns does."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.core.commands import Command
from kvasir.core.events import Arrived, BlocksStored, Event, Finished, InstanceInfo, InstanceJoined, PrefillDone
from kvasir.core.request import FinishReason, Request, Role, Slo
from kvasir.costs.roofline import reference_cost
from kvasir.report.slo import ScaledSlo
from kvasir.scheduling import few, placer
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.policies import POLICIES
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.policies.interface import Placement
from kvasir.scheduling.policies.kvasir import Kvasir
from kvasir.scheduling.strategy import strategy
from kvasir.scheduling.view import ClusterView

CONFIG = ConductorConfig(kv_bytes_per_token=327_680, block_tokens=512, layerwise=True, max_stages=8)
KEYS = tuple(number.to_bytes(16, "big") for number in range(256))
SIZES = [300, 4_000, 30_000, 131_000]


class ByColumns:
    """A policy that is never asked number by number."""

    def __init__(self, policy: Placement):
        self._policy = policy
        self.name = policy.name

    def place(self, view: ClusterView, rng: Random) -> Choice:
        return self._policy.place(view, rng)


def said(
    policy: str,
    decode: str,
    slo: Slo | ScaledSlo,
    arrivals: list[tuple[int, int, bool]],
    num_instances: int = 6,
    config: ConductorConfig = CONFIG,
) -> list[list[Command]]:
    """What a conductor says: each arrival is a size, after what gap, and whether it finishes."""
    rules = replace(strategy(policy), decode=decode)
    conductor = rules.conductor(config, reference_cost(), slo, Random(0))
    roles = (Role.PREFILL, Role.MIXED, Role.DECODE) * (num_instances // 3)
    a_node = 3 if config.stages_on_one_node else 1
    infos = [InstanceInfo(f"i{index}", role, f"n{index // a_node}", 1, 400_000, 16) for index, role in enumerate(roles)]
    events: list[Event] = [InstanceJoined(info) for info in infos]
    events += [BlocksStored(f"n{index}", 1, KEYS[: 7 * (index % 6 + 1)]) for index in range(0, num_instances, 2)]
    answers = [conductor.handle(event, 0.0) for event in events]
    for number, (size, gap, finishes) in enumerate(arrivals):
        now = 0.1 * (number + gap)
        request = Request(f"r{number}", SIZES[size], 200, KEYS[: SIZES[size] // 512], now)
        answers.append(conductor.handle(Arrived(request), now))
        placed = conductor.placed(request.id)
        if finishes and placed is not None:
            name = placed.prefill
            answers.append(conductor.handle(PrefillDone(request.id, name, 0), now))
            placed = conductor.placed(request.id)
            if placed is not None and placed.decode is not None and number % 2:
                answers.append(conductor.handle(Finished(request.id, placed.decode, FinishReason.LENGTH, 99), now))
    conductor.check()
    return answers


ARRIVALS = st.lists(st.tuples(st.integers(0, len(SIZES) - 1), st.integers(0, 5), st.booleans()), min_size=1, max_size=40)


def in_time(arrivals: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    """With the sum of gaps until each."""
    return [(size, sum(gap for _, gap, _ in arrivals[: place + 1]), ends) for place, (size, gap, ends) in enumerate(arrivals)]


@pytest.mark.parametrize("policy", ["kvasir", "mooncake", "local"])
@pytest.mark.parametrize("decode", ["least-expected-tbt", "least-tbt", "stay"])
@pytest.mark.parametrize("slo", [Slo(), ScaledSlo()])
@settings(max_examples=10, deadline=None)
@given(arrivals=ARRIVALS)
def test_a_few_instances_get_what_they_would_get_by_columns(
    policy: str, decode: str, slo: Slo | ScaledSlo, arrivals: list[tuple[int, int, bool]]
) -> None:
    arrivals = in_time(arrivals)
    by_numbers = said(policy, decode, slo, arrivals)
    make = POLICIES[policy]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placer, "FEW", 0)
        patch.setitem(POLICIES, policy, lambda: ByColumns(make()))
        assert said(policy, decode, slo, arrivals) == by_numbers


@pytest.mark.parametrize("num_instances", [6, 12])
@settings(max_examples=20, deadline=None)
@given(arrivals=ARRIVALS)
def test_stages_of_one_node_are_the_same_by_columns(num_instances: int, arrivals: list[tuple[int, int, bool]]) -> None:
    arrivals = in_time(arrivals)
    config = replace(CONFIG, stages_on_one_node=True)
    by_numbers = said("kvasir", "least-expected-tbt", Slo(10.0), arrivals, num_instances, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placer, "FEW", 0)
        patch.setitem(POLICIES, "kvasir", lambda: ByColumns(Kvasir()))
        assert said("kvasir", "least-expected-tbt", Slo(10.0), arrivals, num_instances, config) == by_numbers


@pytest.mark.parametrize("policy", ["kvasir", "mooncake", "local"])
@pytest.mark.parametrize("num_instances", [6, 60])
@settings(max_examples=20, deadline=None)
@given(arrivals=ARRIVALS)
def test_those_who_can_be_best_get_what_they_would_get_among_all(
    policy: str, num_instances: int, arrivals: list[tuple[int, int, bool]]
) -> None:
    arrivals = in_time(arrivals)
    among_all = said(policy, "least-expected-tbt", Slo(), arrivals, num_instances)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placer, "FEW", 0)
        patch.setattr(few, "FEW", 0)
        assert said(policy, "least-expected-tbt", Slo(), arrivals, num_instances) == among_all
