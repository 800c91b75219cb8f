"""The published trace through reader and cache model gives the figures that others computed."""

import pytest

from kvasir.workload.figures import CONVERSATION_FIGURES, CONVERSATION_HIT_RATE, figures, hit_curve
from kvasir.workload.trace import Trace


def test_the_real_trace_has_its_published_figures(real_trace: Trace) -> None:
    assert real_trace.num_unsorted == 0
    assert figures(real_trace) == pytest.approx(CONVERSATION_FIGURES, rel=5e-4)


def test_the_cache_model_gives_the_published_hit_rates(real_trace: Trace) -> None:
    assert hit_curve(real_trace) == pytest.approx(CONVERSATION_HIT_RATE, abs=5e-5)


def test_block_0_is_shared_by_every_request(real_trace: Trace) -> None:
    assert all(r.hash_ids[0] == 0 for r in real_trace.requests)
