"""Placing number by number decides what placing by columns does."""

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
from kvasir.scheduling import placer
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.strategy import strategy

CONFIG = ConductorConfig(kv_bytes_per_token=327_680, block_tokens=512, layerwise=True, max_stages=8)
KEYS = tuple(number.to_bytes(16, "big") for number in range(256))
SIZES = [300, 4_000, 30_000, 131_000]


def said(policy: str, decode: str, slo: Slo | ScaledSlo, arrivals: list[tuple[int, int, bool]]) -> list[list[Command]]:
    """What a conductor of six instances says: each arrival is a size, a place in the order of nodes, whether it finishes."""
    rules = replace(strategy(policy), decode=decode)
    conductor = rules.conductor(CONFIG, reference_cost(), slo, Random(0))
    roles = (Role.PREFILL, Role.MIXED, Role.DECODE) * 2
    infos = [InstanceInfo(f"i{index}", role, f"n{index}", 1, 400_000, 16) for index, role in enumerate(roles)]
    events: list[Event] = [InstanceJoined(info) for info in infos]
    events += [BlocksStored(f"n{index}", 1, KEYS[: 7 * (index + 1)]) for index in range(0, 6, 2)]
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


@pytest.mark.parametrize("policy", ["kvasir", "mooncake", "local"])
@pytest.mark.parametrize("decode", ["least-expected-tbt", "least-tbt", "stay"])
@pytest.mark.parametrize("slo", [Slo(), ScaledSlo()])
@settings(max_examples=10, deadline=None)
@given(arrivals=ARRIVALS)
def test_a_few_instances_get_what_they_would_get_among_many(
    policy: str, decode: str, slo: Slo | ScaledSlo, arrivals: list[tuple[int, int, bool]]
) -> None:
    arrivals = [
        (size, sum(gap for _, gap, _ in arrivals[: place + 1]), ends) for place, (size, gap, ends) in enumerate(arrivals)
    ]
    few = said(policy, decode, slo, arrivals)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placer, "FEW", 0)
        assert said(policy, decode, slo, arrivals) == few
