"""Scaling keeps prefix sharing, order and consistency, whatever the factor."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.errors import ConfigError, TraceError
from kvasir.workload.content import BlockContent
from kvasir.workload.scaling import cap_output, jitter, limit, scale_length, speed, window
from kvasir.workload.trace import Trace, TraceRequest

FACTORS = st.floats(0.0005, 4.0)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Requests that share prefixes: each continues the head of one before it with new blocks."""
    requests: list[TraceRequest] = []
    next_id, now = 1, 0.0
    for _ in range(draw(st.integers(1, 8))):
        head = draw(st.sampled_from(requests)).hash_ids if requests else (0,)
        kept = head[: draw(st.integers(1, len(head)))]
        ids = kept + tuple(range(next_id, next_id := next_id + draw(st.integers(1, 4))))
        tokens = 512 * (len(ids) - 1) + draw(st.integers(1, 512))
        now += draw(st.floats(0, 100))
        requests.append(TraceRequest(now, tokens, draw(st.integers(1, 2000)), ids))
    return Trace(tuple(requests))


def shared(left: list[int] | tuple[int, ...], right: list[int] | tuple[int, ...]) -> int:
    """Length of the common prefix."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@given(traces(), FACTORS)
def test_scaled_lengths_stay_consistent_with_the_blocks(trace: Trace, factor: float) -> None:
    scaled = scale_length(trace, factor)
    for before, after in zip(trace.requests, scaled.requests, strict=True):
        assert after.hash_ids == before.hash_ids
        assert -(-after.input_tokens // scaled.block_tokens) == len(after.hash_ids)
        assert after.output_tokens == max(1, round(before.output_tokens * factor))


@given(traces(), st.floats(0.008, 0.1))
def test_the_prompts_of_scaled_requests_share_what_their_blocks_share(trace: Trace, factor: float) -> None:
    scaled = scale_length(trace, factor)
    content = BlockContent(range(1000, 20_000), scaled.block_tokens)
    prompts = [content.prompt(r) for r in scaled.requests]
    for i, right in enumerate(scaled.requests):
        for j, left in enumerate(scaled.requests[:i]):
            blocks = shared(left.hash_ids, right.hash_ids)
            tokens = min(blocks * scaled.block_tokens, left.input_tokens, right.input_tokens)
            assert shared(prompts[j], prompts[i]) == tokens


def test_a_twentieth_of_a_long_prompt_is_about_600_tokens() -> None:
    trace = Trace((TraceRequest(0.0, 12_000, 340, tuple(range(24))),))
    scaled = scale_length(trace, 0.05)
    assert scaled.block_tokens == 26
    assert scaled.requests[0].input_tokens == pytest.approx(600, rel=0.02)
    assert scaled.requests[0].output_tokens == 17


def test_outputs_scale_by_their_own_factor_when_given() -> None:
    trace = Trace((TraceRequest(0.0, 512, 340, (0,)),))
    assert scale_length(trace, 0.05, output_factor=0.5).requests[0].output_tokens == 170


@given(traces())
def test_a_factor_of_one_changes_nothing(trace: Trace) -> None:
    assert scale_length(trace, 1.0) == trace
    assert speed(trace, 1.0) == trace
    assert window(trace) == trace


def test_speed_divides_the_arrival_times() -> None:
    assert [r.arrival_s for r in speed(three(), 4.0).requests] == [0.0, 2.5, 5.0]


def test_a_limit_keeps_the_first_requests() -> None:
    assert limit(three(), 2).requests == three().requests[:2]
    assert limit(three(), 99) == three()


def test_a_window_starts_its_own_clock() -> None:
    cut = window(three(), start_s=5.0, duration_s=15.0)
    assert [r.arrival_s for r in cut.requests] == [5.0]


def test_a_window_without_requests_is_refused() -> None:
    with pytest.raises(TraceError, match=r"no request arrives in \[100 s, inf s\); the trace's last arrival is at 20 s"):
        window(three(), start_s=100.0)


@given(traces(), st.integers())
def test_jitter_moves_arrivals_a_little_and_keeps_the_requests(trace: Trace, seed: int) -> None:
    moved = jitter(trace, random.Random(seed), width_s=3.0)
    assert moved == jitter(trace, random.Random(seed), width_s=3.0)
    assert sorted(r.hash_ids for r in moved.requests) == sorted(r.hash_ids for r in trace.requests)
    for before, after in zip(trace.requests, moved.requests, strict=True):
        assert before.arrival_s <= after.arrival_s <= before.arrival_s + 3.0


def test_outputs_are_capped() -> None:
    assert [r.output_tokens for r in cap_output(three(), 2).requests] == [1, 2, 2]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_that_are_not_above_zero_are_refused(bad: float) -> None:
    for change in (speed, scale_length):
        with pytest.raises(ConfigError, match="expected a number above 0"):
            change(three(), bad)
    with pytest.raises(ConfigError, match="expected 0 or more"):
        window(three(), start_s=-1.0)
    with pytest.raises(ConfigError, match="not a limit: 0"):
        limit(three(), 0)


def three() -> Trace:
    first = TraceRequest(0.0, 512, 1, (0,))
    later = [dataclasses.replace(first, arrival_s=10.0 * i, output_tokens=i + 1) for i in (1, 2)]
    return Trace((first, *later))
