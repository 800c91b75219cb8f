"""The figures by which traces are compared, and those of the published conversation trace."""

from collections import Counter

import numpy as np

from kvasir.workload.cache_model import lru_hit_curve
from kvasir.workload.trace import Trace

CONVERSATION_FIGURES: dict[str, float] = {
    "requests": 12_031,
    "span_s": 3_537,
    "input_mean": 12_035,
    "input_p50": 6_909,
    "input_p90": 27_367,
    "input_p99": 85_399,
    "input_max": 126_195,
    "output_mean": 342.6,
    "output_p50": 350,
    "output_p90": 597,
    "output_p99": 1_118,
    "blocks": 288_500,
    "distinct_blocks": 182_790,
    "stamps": 1_180,
    "mean_burst": 10.2,
    "max_burst": 28,
}
"""Of kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl, computed independently of this code."""

CONVERSATION_HIT_RATE: dict[int | None, float] = {
    1_000: 0.0445,
    2_000: 0.0537,
    5_860: 0.1355,
    10_000: 0.2112,
    30_000: 0.3257,
    50_000: 0.3546,
    100_000: 0.3637,
    None: 0.3664,
}
"""Block hit rate of that trace by LRU capacity in blocks; None is unlimited."""


def figures(trace: Trace) -> dict[str, float]:
    """The figures of `trace`, by the names of `CONVERSATION_FIGURES`: tokens, seconds, blocks and requests a stamp."""
    inputs = np.array([r.input_tokens for r in trace.requests])
    outputs = np.array([r.output_tokens for r in trace.requests])
    bursts = Counter(r.arrival_s for r in trace.requests)
    blocks = [block for r in trace.requests for block in r.hash_ids]
    return {
        "requests": len(trace.requests),
        "span_s": trace.span_s,
        "input_mean": float(inputs.mean()),
        "input_max": int(inputs.max()),
        "output_mean": float(outputs.mean()),
        "blocks": len(blocks),
        "distinct_blocks": len(set(blocks)),
        "stamps": len(bursts),
        "mean_burst": len(trace.requests) / len(bursts),
        "max_burst": max(bursts.values()),
        **{f"input_p{p}": float(np.percentile(inputs, p)) for p in (50, 90, 99)},
        **{f"output_p{p}": float(np.percentile(outputs, p)) for p in (50, 90, 99)},
    }


def hit_curve(trace: Trace) -> dict[int | None, float]:
    """Block hit rates of `trace` at the capacities of `CONVERSATION_HIT_RATE`."""
    return lru_hit_curve(trace.requests, CONVERSATION_HIT_RATE)
