"""The SSD tier in virtual time: blocks are written through, come back when DRAM has let them go, and survive a crash."""

from random import Random

import pytest

from kvasir.core.request import Role
from kvasir.report.timeline import Status
from kvasir.scheduling.strategy import strategy
from kvasir.simulator import SimConfig
from kvasir.simulator.faults import Fault, FaultKind, fault_plan
from kvasir.simulator.spec import MemoryKind
from tests.simulator.tiny import FLAT, cluster, play, random_trace, trace

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
IDS = tuple(range(1, 9))
LOADS = strategy("mooncake").with_parts(placement="kvasir", admission="off")
"""Of the placements, `kvasir` plans with what is on SSD."""


def test_after_a_crash_of_the_node_a_prefix_is_read_from_its_ssd() -> None:
    """800 tokens are computed by 0.8 s and written by 0.96 s; later they are read in 0.16 s, and 10 more computed."""
    run = play(
        trace((0.0, 800, 1, IDS), (4.0, 810, 1, (*IDS, 99))),
        cluster([M], costs=FLAT, ssd_tokens=10_000),
        LOADS,
        config=SimConfig(layerwise=False),
        faults=[Fault(2.0, FaultKind.NODE, "n0", 1.0)],
    )
    assert run.counters["loaded_blocks"] == 8
    assert run.records.cached_tokens.tolist() == [0, 800]
    assert run.records.ttft_s[1] == pytest.approx(0.16 + 0.01)


def test_what_was_not_written_before_the_crash_is_computed_again() -> None:
    run = play(
        trace((0.0, 800, 1, IDS), (4.0, 810, 1, (*IDS, 99))),
        cluster([M], costs=FLAT, ssd_tokens=10_000),
        LOADS,
        config=SimConfig(layerwise=False),
        faults=[Fault(0.801, FaultKind.NODE, "n0", 1.0)],
    )
    assert run.records.cached_tokens.tolist() == [0, 0]


@pytest.mark.parametrize("memory", list(MemoryKind))
@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_has_one_outcome_with_an_ssd(memory: MemoryKind, layerwise: bool, seed: int) -> None:
    spec = cluster([P, P, D, M], kv_tokens=8_000, dram_tokens=8_000, memory=memory, max_batch=6, ssd_tokens=40_000)
    faults = fault_plan(Random(seed), spec, span_s=40.0, count=8, mean_duration_s=3.0)
    config = SimConfig(layerwise=layerwise, max_tokens=64)
    run = play(random_trace(seed, 150), spec, LOADS, faults=faults, config=config, seed=seed)
    assert run.counters["loads"] > 0
    assert run.records.is_(Status.OK).sum() > 100
