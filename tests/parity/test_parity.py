"""The live bodies and the simulator's make the same decisions at the same times from the same trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import msgspec
import pytest

from kvasir.core.commands import Decision
from kvasir.core.request import Slo
from kvasir.scheduling.strategy import Strategy, strategy
from kvasir.workload import scaling
from kvasir.workload.trace import Trace
from tests.cluster.harness import BLOCK
from tests.parity.both import Case, conversations, lived, simulated

TOLERANCE_S = 1e-6
"""Passes of a repeated decode step end where their sum says, not one after another; the rest is rounding."""

TIGHT = Slo(ttft_s=0.3, tbt_s=0.02)

SCHEDULERS = {
    "mooncake": (strategy("mooncake").with_parts(admission="off"), Slo()),
    "mooncake, slo": (strategy("mooncake").with_parts(admission="slo"), TIGHT),
    "kvasir, static, slo": (strategy("kvasir").with_parts(roles="static", admission="slo"), TIGHT),
    "kvasir, elastic": (strategy("kvasir").with_parts(admission="off"), Slo()),
    "local": (strategy("local").with_parts(admission="off"), Slo()),
    "least-loaded, slo": (strategy("least-loaded").with_parts(admission="slo"), TIGHT),
}


def differences(live: object, other: object, path: str = "") -> list[str]:
    """Where two trees of plain values differ; numbers may by the tolerance."""
    if isinstance(live, float) and isinstance(other, int | float):
        is_same = live == other or abs(live - other) <= TOLERANCE_S
        return [] if is_same else [f"{path}: live {live!r}, simulated {other!r}"]
    if isinstance(live, dict) and isinstance(other, dict) and live.keys() == other.keys():
        return [text for key in live for text in differences(live[key], other[key], f"{path}.{key}")]
    if isinstance(live, tuple) and isinstance(other, tuple) and len(live) == len(other):
        return [text for i, pair in enumerate(zip(live, other, strict=True)) for text in differences(*pair, f"{path}[{i}]")]
    return [] if live == other else [f"{path}: live {live!r}, simulated {other!r}"]


def assert_same(live: Sequence[Decision], other: Sequence[Decision]) -> None:
    for one, two in zip(live, other, strict=False):
        assert not (found := differences(msgspec.to_builtins(one), msgspec.to_builtins(two))), (one.request_id, found)
    assert len(live) == len(other)


@pytest.mark.parametrize("split", ["1P1D", "2P2D", "1M", "2P2D1M"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_both_bodies_decide_alike(split: str, scheduler: str) -> None:
    parts, slo = SCHEDULERS[scheduler]
    case, trace = Case(split, parts, slo), conversations(seed=1, count=150, rate=40.0)
    live = lived(case, trace)
    assert len(live) == len(trace.requests)
    if slo is TIGHT and split in ("1P1D", "1M"):
        assert any(decision.refusal for decision in live), "the load is too small to test rejections"
    for max_repeats in (1, 1 << 20):
        assert_same(live, simulated(case, trace, max_repeats=max_repeats))


@pytest.mark.parametrize("split", ["4P1D", "3P1D2M"])
def test_both_bodies_run_the_same_pipelines(split: str) -> None:
    parts = strategy("kvasir").with_parts(roles="static", admission="off").live(32)
    case, trace = Case(split, parts, Slo(0.008, 0.1), max_stages=4), conversations(seed=4, count=150, rate=10.0)
    live = lived(case, trace)
    assert sum(len(decision.candidates[0].group) > 1 for decision in live) > 20
    for max_repeats in (1, 1 << 20):
        assert_same(live, simulated(case, trace, max_repeats=max_repeats))


@pytest.mark.parametrize("eviction", ["lru", "cost-aware"])
def test_a_pool_that_must_evict_does_so_alike(eviction: str) -> None:
    """The trace's blocks are more than the pool holds, so a wrong victim is a wrong prefix later."""
    case = Case("1P1D", strategy("mooncake").with_parts(admission="off", eviction=eviction), num_slots=400)
    trace = conversations(seed=3, count=200, rate=10.0)
    live = lived(case, trace)
    roomy = lived(replace(case, num_slots=8192), trace)
    assert [d.candidates[0].prefix_tokens for d in live] != [d.candidates[0].prefix_tokens for d in roomy]
    assert_same(live, simulated(case, trace, max_repeats=1))
    assert_same(live, simulated(case, trace, max_repeats=1 << 20))


@pytest.mark.parametrize("split", ["1P1D", "2P2D1M"])
@pytest.mark.parametrize("parts", [strategy("mooncake"), strategy("kvasir")], ids=lambda parts: parts.name)
def test_both_bodies_decide_alike_on_published_traffic(split: str, parts: Strategy, real_trace: Trace) -> None:
    case, trace = Case(split, parts, Slo(2.0, 0.02), num_slots=16384), beginning(real_trace, count=200)
    live = lived(case, trace)
    assert len(live) == len(trace.requests)
    assert_same(live, simulated(case, trace, max_repeats=1 << 20))


def beginning(trace: Trace, count: int) -> Trace:
    """Its first requests at 1/32 of their lengths and thrice the rate, spread over its stamps, from 1 s on."""
    trace = scaling.limit(trace, count)
    trace = scaling.speed(scaling.jitter(scaling.scale_length(trace, BLOCK / trace.block_tokens), Random(0), width_s=3.0), 3.0)
    return replace(trace, requests=tuple(replace(r, arrival_s=r.arrival_s + 1.0) for r in trace.requests))
