"""Whatever breaks, every request has exactly one outcome, nothing is left behind, and equal seeds give equal runs."""

from random import Random

import msgspec
import pytest

from kvasir.core.errors import ConfigError
from kvasir.core.request import Role, Slo
from kvasir.report.timeline import Status
from kvasir.scheduling.strategy import strategy
from kvasir.simulator import SimConfig
from kvasir.simulator.faults import Fault, FaultKind, fault_plan
from kvasir.simulator.spec import MemoryKind
from tests.simulator.tiny import FLAT, cluster, play, random_trace, trace

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def test_a_crashed_prefill_is_done_again_elsewhere() -> None:
    run = play(
        trace((0.0, 300, 3, (1, 2, 3))),
        cluster([P, P, D], costs=FLAT),
        faults=[Fault(0.1, FaultKind.INSTANCE, "i0", 5.0)],
    )
    assert run.records.ttft_s[0] == pytest.approx(0.1 + 0.3)
    assert run.records.output_tokens[0] == 3


def test_a_crashed_decode_replays_prompt_and_tokens_so_far() -> None:
    """Token 1 at 0.3 s, 2 and 3 at 0.35 and 0.37 s; the pass in flight at the crash is lost."""
    run = play(
        trace((0.0, 300, 10, (1, 2, 3))),
        cluster([P, D, D], costs=FLAT),
        config=SimConfig(layerwise=False),
        faults=[Fault(0.375, FaultKind.INSTANCE, "i1", 5.0)],
    )
    tokens = 300 + 3
    again = 0.375 + 3 * 1e-3  # the blocks of the prompt are cached
    assert run.records.end_s[0] == pytest.approx(again + tokens * 1e-4 + (10 - 4) * 0.02)
    assert run.records.tbt_s[0] == pytest.approx(tokens * 1e-4 + 0.02)  # the second hand-off
    assert run.records.output_tokens[0] == 10


def test_a_lost_node_forgets_its_blocks() -> None:
    ids = (1, 2, 3)
    run = play(
        trace((0.0, 250, 1, ids), (1.0, 250, 1, ids), (4.0, 250, 1, ids)),
        cluster([M]),
        faults=[Fault(2.0, FaultKind.NODE, "n0", 1.0)],
    )
    assert run.records.cached_tokens.tolist() == [0, 200, 0]


def test_without_any_instance_requests_fail_at_once_or_wait_for_one() -> None:
    run = play(
        trace((0.0, 300, 5, (1, 2, 3)), (0.2, 100, 5, (9,))),
        cluster([M]),
        faults=[Fault(0.1, FaultKind.INSTANCE, "i0", 1.0)],
    )
    assert run.records.is_(Status.OK).tolist() == [True, False]
    assert run.records.reason[1] == "no_instance"
    assert run.records.ttft_s[0] == pytest.approx(1.1 + 0.3)


def test_a_slow_nic_delays_hand_offs() -> None:
    run = play(
        trace((0.0, 250, 2, (1, 2, 3))),
        cluster([P, D], costs=FLAT),
        config=SimConfig(layerwise=False),
        faults=[Fault(0.0, FaultKind.SLOW_NIC, "n1", 1.0, factor=0.5)],
    )
    assert run.records.end_s[0] == pytest.approx(0.25 + 0.05 + 0.02)


@pytest.mark.parametrize("memory", list(MemoryKind))
@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_every_request_has_one_outcome_whatever_breaks(memory: MemoryKind, layerwise: bool, seed: int) -> None:
    spec = cluster([P, P, D, D, M], kv_tokens=8_000, dram_tokens=8_000, memory=memory, max_batch=6)
    faults = fault_plan(Random(seed), spec, span_s=40.0, count=12, mean_duration_s=3.0)
    config = SimConfig(layerwise=layerwise, max_tokens=64)
    played = random_trace(seed, 150)
    run = play(played, spec, faults=faults, config=config, seed=seed)
    ok = run.records.is_(Status.OK)
    expected = [r.output_tokens for r, is_ok in zip(played.requests, ok, strict=True) if is_ok]
    assert run.records.output_tokens[ok].tolist() == expected
    assert ok.sum() > 100
    again = play(played, spec, faults=faults, config=config, seed=seed)
    assert msgspec.json.encode(again.to_json()) == msgspec.json.encode(run.to_json())


@pytest.mark.parametrize("kv_tokens", [40_000, 8_000])
@pytest.mark.parametrize("seed", range(6))
def test_pipelines_in_shared_pages_leave_nothing_behind_whatever_breaks(kv_tokens: int, seed: int) -> None:
    spec = cluster(
        [P, P, P, P, D], kv_tokens=kv_tokens, dram_tokens=kv_tokens, memory=MemoryKind.SHARED, same_node=True, max_batch=8
    )
    spec = msgspec.structs.replace(spec, max_stages=4)
    faults = [f for f in fault_plan(Random(seed), spec, span_s=60.0, count=24, mean_duration_s=1.0) if f.target != "n0"]
    hurried = strategy("kvasir").with_parts(admission="off", roles="static").live(100)
    config = SimConfig(max_tokens=64, keep_decisions=True)
    run = play(random_trace(seed, 150, rate=2.0), spec, hurried, faults=faults, config=config, seed=seed, slo=Slo(0.3, 1.0))
    assert run.decisions is not None
    assert sum(len(decision.candidates[0].group) > 1 for decision in run.decisions if decision.candidates) > 10
    assert run.records.is_(Status.OK).sum() > 100


@pytest.mark.parametrize("policy", ["random", "round-robin", "least-loaded", "local", "mooncake", "kvasir"])
def test_every_strategy_answers_everything_in_tight_memory(policy: str) -> None:
    spec = cluster([M, M, P, D], kv_tokens=5_000, dram_tokens=5_000, max_batch=4)
    run = play(random_trace(3, 200, rate=3.0), spec, policy, config=SimConfig(max_tokens=64))
    assert run.records.is_(Status.OK).all()


def test_repeated_decode_passes_change_nothing_but_speed() -> None:
    spec = cluster([P, P, D, D])
    played = random_trace(7, 120)
    fast = play(played, spec, config=SimConfig(max_tokens=64))
    slow = play(played, spec, config=SimConfig(max_tokens=64, max_repeats=1))
    assert fast.records.ttft_s == pytest.approx(slow.records.ttft_s)
    assert fast.records.end_s == pytest.approx(slow.records.end_s)
    assert fast.records.tbt_s == pytest.approx(slow.records.tbt_s, rel=0.02, nan_ok=True)


def test_a_fault_must_name_something() -> None:
    with pytest.raises(ConfigError, match="n7"):
        play(trace((0.0, 10, 1, (1,))), cluster([M]), faults=[Fault(0.0, FaultKind.NODE, "n7", 1.0)])
