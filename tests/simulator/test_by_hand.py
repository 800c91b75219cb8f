"""Tiny clusters whose every second can be worked out by hand."""

from typing import Any

import pytest
from msgspec.structs import replace

from kvasir.core.errors import ConfigError
from kvasir.core.request import Role
from kvasir.simulator import SimConfig
from kvasir.simulator.spec import MemoryKind
from tests.simulator.tiny import COSTS, FLAT, cluster, play, trace

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
NO_OVERLAP = SimConfig(layerwise=False)
BOTH_KINDS = pytest.mark.parametrize("memory", list(MemoryKind))


@BOTH_KINDS
def test_one_request_takes_its_prefill_and_its_decode_passes(memory: MemoryKind) -> None:
    run = play(trace((1.0, 250, 11, (1, 2, 3))), cluster([M], memory=memory))
    assert run.records.ttft_s[0] == pytest.approx(0.25)
    passes = [0.02 + 1e-5 * (251 + i) for i in range(10)]
    assert run.records.end_s[0] == pytest.approx(1.25 + sum(passes))
    assert run.records.tbt_s[0] == pytest.approx(sum(passes) / 10)  # passes of one step are logged as equal
    assert run.records.output_tokens[0] == 11
    assert run.records.cached_tokens[0] == 0


@BOTH_KINDS
def test_a_shared_prefix_is_computed_once(memory: MemoryKind) -> None:
    run = play(trace((0.0, 250, 1, (1, 2, 3)), (1.0, 350, 1, (1, 2, 4, 5))), cluster([M], memory=memory))
    assert run.records.cached_tokens.tolist() == [0, 200]
    assert run.records.ttft_s.tolist() == pytest.approx([0.25, 0.15])
    assert run.hit_rate == 2 / 5  # of 2 + 3 full blocks


@BOTH_KINDS
def test_a_fully_cached_prompt_computes_its_last_token(memory: MemoryKind) -> None:
    run = play(trace((0.0, 201, 3, (1, 2, 3)), (1.0, 201, 3, (1, 2, 4))), cluster([M], memory=memory))
    assert run.records.cached_tokens.tolist() == [0, 200]
    assert run.records.ttft_s[1] == pytest.approx(0.02 + 1e-5 * 201)  # one token on a context: a decode pass


def test_a_hand_off_without_overlap_moves_all_bytes_after_the_prefill() -> None:
    run = play(trace((0.0, 250, 3, (1, 2, 3))), cluster([P, D], costs=FLAT), config=NO_OVERLAP)
    assert run.records.ttft_s[0] == pytest.approx(0.25)
    assert run.records.end_s[0] == pytest.approx(0.25 + 0.025 + 2 * 0.02)
    assert run.records.tbt_s[0] == pytest.approx(0.025 + 0.02)


def test_a_layerwise_hand_off_ends_one_layer_after_the_prefill() -> None:
    run = play(trace((0.0, 250, 3, (1, 2, 3))), cluster([P, D], costs=FLAT))
    assert run.records.end_s[0] == pytest.approx(0.25 + 0.0025 + 2 * 0.02)


@BOTH_KINDS
def test_a_hand_off_on_one_node_takes_no_time(memory: MemoryKind) -> None:
    run = play(trace((0.0, 250, 3, (1, 2, 3))), cluster([P, D], costs=FLAT, same_node=True, memory=memory))
    assert run.records.end_s[0] == pytest.approx(0.25 + 2 * 0.02)
    assert run.counters["flows"] == 0


@BOTH_KINDS
@pytest.mark.parametrize(("same_node", "bytes_s"), [(True, 0.0), (False, 0.025)])
def test_a_hand_off_takes_its_messages_too(memory: MemoryKind, same_node: bool, bytes_s: float) -> None:
    spec = replace(cluster([P, D], costs=FLAT, same_node=same_node, memory=memory), hand_off_s=0.007)
    run = play(trace((0.0, 250, 3, (1, 2, 3))), spec, config=NO_OVERLAP)
    assert run.records.ttft_s[0] == pytest.approx(0.25)
    assert run.records.end_s[0] == pytest.approx(0.25 + bytes_s + 0.007 + 2 * 0.02)


def test_noise_makes_steps_longer_and_shorter() -> None:
    requests, spec = trace((0.0, 250, 11, (1, 2, 3))), cluster([M])
    expected = play(requests, spec).records
    twice = play(requests, replace(spec, step_noise=(2.0,))).records
    assert twice.ttft_s[0] == pytest.approx(2 * expected.ttft_s[0])
    assert twice.end_s[0] == pytest.approx(2 * expected.end_s[0])
    noisy = replace(spec, step_noise=(0.5, 1.0, 1.5))
    ends = [play(requests, noisy, seed=seed, config=SimConfig(max_repeats=1)).records.end_s[0] for seed in (0, 0, 1)]
    assert ends[0] == ends[1] != ends[2]
    assert 0.5 * expected.end_s[0] < ends[0] < 1.5 * expected.end_s[0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"hand_off_s": -0.1}, "cluster tiny: hand_off_s: got -0.1, expected 0 or more"),
        ({"max_stages": 0}, r"cluster tiny: max_stages: got 0, expected at least 1"),
        ({"step_noise": (1.0, 0.0)}, r"cluster tiny: step_noise: got \(1.0, 0.0\), expected numbers above 0"),
    ],
)
def test_no_cluster_has_such_steps(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        play(trace((0.0, 250, 3, (1, 2, 3))), replace(cluster([M]), **bad))


def test_a_shared_memory_hand_off_between_nodes_copies_the_blocks() -> None:
    spec = cluster([P, D], costs=FLAT, memory=MemoryKind.SHARED)
    run = play(trace((0.0, 250, 3, (1, 2, 3))), spec, config=NO_OVERLAP)
    assert run.records.end_s[0] == pytest.approx(0.25 + 0.025 + 2 * 0.02)


def test_two_hand_offs_from_one_node_share_its_nic() -> None:
    """Both prompts end at 0.4 s, in one step; 200 tokens each pass at half speed to different nodes."""
    requests = trace((0.0, 200, 2, (1, 2)), (0.0, 200, 2, (3, 4)))
    run = play(requests, cluster([P, D, D], costs=FLAT), config=NO_OVERLAP)
    first, second = sorted(run.records.end_s.tolist())
    if run.records.ttft_s[0] == pytest.approx(0.4):
        assert [first, second] == pytest.approx([0.4 + 0.04 + 0.02] * 2)
    else:  # one prompt after the other: nothing to share
        assert [first, second] == pytest.approx([0.2 + 0.02 + 0.02, 0.4 + 0.02 + 0.02])


def test_decoding_sequences_wait_for_each_other_in_one_batch() -> None:
    """The second joins at a pass boundary: its first gap ends with the pass that it is first in."""
    run = play(trace((0.0, 100, 21, (1,)), (0.05, 100, 3, (2,))), cluster([P, D], costs=FLAT, same_node=True))
    # first: token at 0.1, passes at 0.12 ... ; second: token at 0.2, a boundary, joins the next pass
    assert run.records.end_s[0] == pytest.approx(0.1 + 20 * 0.02)
    assert run.records.ttft_s[1] == pytest.approx(0.15)
    assert run.records.end_s[1] == pytest.approx(0.2 + 2 * 0.02, abs=0.0201)


def test_costs_of_a_batch_grow_with_its_context() -> None:
    run = play(trace((0.0, 100, 2, (1,))), cluster([M]))
    assert run.records.tbt_s[0] == pytest.approx(COSTS.decode_step_s(1, 101))


def test_days_without_a_request_cost_nothing() -> None:
    """A month apart; with an event for each second this would take minutes."""
    month_s = 30 * 86400.0
    run = play(trace((0.0, 250, 2, (1, 2, 3)), (month_s, 250, 2, (4, 5, 6))), cluster([P, D]), config=NO_OVERLAP)
    assert run.records.ttft_s.tolist() == pytest.approx([0.25, 0.25])
