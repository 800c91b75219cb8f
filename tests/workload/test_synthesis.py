"""The synthetic conversation trace: as close to the real one as it says, seeded, consistent, of any size."""

import numpy as np
import pytest

from kvasir.core.errors import ConfigError
from kvasir.workload.figures import CONVERSATION_FIGURES, CONVERSATION_HIT_RATE, figures, hit_curve
from kvasir.workload.source import is_synthetic, synthesise
from kvasir.workload.synthesis import conversation
from kvasir.workload.trace import Trace, read_trace, trace_lines


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    return [conversation(np.random.default_rng(seed)) for seed in range(4)]


def test_the_mean_figures_are_within_six_per_cent_of_the_real_trace(traces: list[Trace]) -> None:
    each = [figures(trace) for trace in traces]
    means = {name: float(np.mean([f[name] for f in each])) for name in CONVERSATION_FIGURES}
    assert means.pop("max_burst") == pytest.approx(CONVERSATION_FIGURES["max_burst"], abs=8)  # an extreme: it scatters
    assert means == pytest.approx({name: CONVERSATION_FIGURES[name] for name in means}, rel=0.06)


def test_the_hit_rate_curve_is_within_002_of_the_real_trace_at_every_seed(traces: list[Trace]) -> None:
    for trace in traces:
        assert hit_curve(trace) == pytest.approx(CONVERSATION_HIT_RATE, abs=0.02)


def test_it_is_a_well_formed_trace(traces: list[Trace]) -> None:
    trace = traces[0]
    assert read_trace(trace_lines(trace.requests)) == trace
    assert all(r.hash_ids[0] == 0 for r in trace.requests)
    assert all(len(set(r.hash_ids)) == len(r.hash_ids) for r in trace.requests)


def test_a_block_always_follows_the_same_prefix(traces: list[Trace]) -> None:
    """An id names a block together with everything before it."""
    parents: dict[int, int] = {}
    for request in traces[0].requests:
        for parent, block in zip(request.hash_ids, request.hash_ids[1:], strict=False):
            assert parents.setdefault(block, parent) == parent


def test_blocks_are_numbered_in_order_of_first_appearance(traces: list[Trace]) -> None:
    seen = list(dict.fromkeys(block for r in traces[0].requests for block in r.hash_ids))
    assert seen == list(range(len(seen)))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    first, again, other = (b"".join(trace_lines(synthesise(f"synthetic:conversation?seed={s}").requests)) for s in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_busier_trace_takes_less_time() -> None:
    trace = conversation(np.random.default_rng(0), num_requests=5_000, rate=10)
    assert len(trace.requests) == 5_000
    assert trace.span_s == pytest.approx(147, abs=6)


@pytest.mark.parametrize(
    ("source", "num_requests", "span_s"),
    [
        ("synthetic:conversation?requests=200", 200, 59),
        ("synthetic:conversation?requests=200&seed=9&duration=10m", 200, 600),
        ("synthetic:conversation?duration=5m&rate=2", 2_039, 300),
        ("synthetic:conversation?requests=1", 1, 0),
    ],
)
def test_a_name_settles_size_and_duration(source: str, num_requests: int, span_s: float) -> None:
    assert is_synthetic(source)
    trace = synthesise(source)
    assert len(trace.requests) == num_requests
    assert trace.span_s == pytest.approx(span_s, abs=20)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("synthetic:agents", "no synthetic trace 'agents'"),
        ("synthetic:conversation?sed=3", "unknown key 'sed'; expected seed, requests, duration, rate"),
        ("synthetic:conversation?requests=many", "requests: got 'many', expected a whole number"),
        ("synthetic:conversation?requests=", "requests: got '', expected a whole number"),
        ("synthetic:conversation?requests=0", "requests: got 0, expected a number above 0"),
        ("synthetic:conversation?rate=fast", "rate: got 'fast', expected a number"),
        ("synthetic:conversation?rate=nan", "rate: got nan, expected a number above 0"),
        ("synthetic:conversation?duration=long", "not a duration: 'long'"),
        ("synthetic:conversation?requests=5&rate=1&duration=5s", "expected at most two"),
    ],
)
def test_a_name_that_means_nothing_is_refused(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        synthesise(source)
