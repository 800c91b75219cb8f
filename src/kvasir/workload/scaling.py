"""Traces made faster, shorter or smaller, so that any machine can replay them; prefix sharing always survives."""

import random
from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter

from kvasir.core.errors import ConfigError, TraceError
from kvasir.workload.trace import Trace, TraceRequest


def speed(trace: Trace, factor: float) -> Trace:
    """The same requests arriving `factor` times as fast: arrival times are divided by it."""
    _require_positive("speed", factor)
    return _with(trace, (replace(r, arrival_s=r.arrival_s / factor) for r in trace.requests))


def scale_length(trace: Trace, factor: float, *, output_factor: float | None = None) -> Trace:
    """Prompts and outputs `factor` times as long (outputs by `output_factor` if given); hash ids stay as they are.

    A hash id then names a block of `round(block_tokens * factor)` tokens (at least 1), so that two prompts share as
    many blocks as before: 0.05 makes 512-token blocks 26 tokens long and a 12,000-token prompt about 600. A partial
    last block shrinks in proportion; every block and every output keeps at least one token.
    """
    _require_positive("scale_length", factor)
    answers = factor if output_factor is None else output_factor
    _require_positive("output_factor", answers)
    block_tokens = max(1, round(trace.block_tokens * factor))
    scaled = (_scaled(r, trace.block_tokens, block_tokens, answers) for r in trace.requests)
    return replace(_with(trace, scaled), block_tokens=block_tokens)


def cap_output(trace: Trace, max_tokens: int) -> Trace:
    """No output longer than `max_tokens`."""
    _require_positive("max_tokens", max_tokens)
    return _with(trace, (replace(r, output_tokens=min(r.output_tokens, max_tokens)) for r in trace.requests))


def limit(trace: Trace, num_requests: int) -> Trace:
    """The first `num_requests` requests."""
    _require_positive("limit", num_requests)
    return _with(trace, trace.requests[:num_requests])


def window(trace: Trace, *, start_s: float = 0.0, duration_s: float | None = None) -> Trace:
    """The requests that arrive in [start_s, start_s + duration_s), their clock set to 0 at `start_s`."""
    if start_s < 0:
        raise ConfigError(f"not a window start: {start_s:g} s; expected 0 or more")
    if duration_s is not None:
        _require_positive("duration_s", duration_s)
    end_s = float("inf") if duration_s is None else start_s + duration_s
    kept = [r for r in trace.requests if start_s <= r.arrival_s < end_s]
    if not kept:
        last_s = trace.requests[-1].arrival_s
        raise TraceError(f"no request arrives in [{start_s:g} s, {end_s:g} s); the trace's last arrival is at {last_s:g} s")
    return _with(trace, (replace(r, arrival_s=r.arrival_s - start_s) for r in kept))


def jitter(trace: Trace, rng: random.Random, *, width_s: float) -> Trace:
    """Arrivals moved later by up to `width_s`, uniformly, and sorted again.

    The published traces stamp arrivals every 3 s, so bursts of ten are an artefact: whoever concludes something from one
    checks it with a jitter of 3 s too.
    """
    _require_positive("width_s", width_s)
    moved = [replace(r, arrival_s=r.arrival_s + rng.uniform(0.0, width_s)) for r in trace.requests]
    return _with(trace, sorted(moved, key=attrgetter("arrival_s")))


def _with(trace: Trace, requests: Iterable[TraceRequest]) -> Trace:
    return replace(trace, requests=tuple(requests))


def _scaled(request: TraceRequest, old_block: int, new_block: int, output_factor: float) -> TraceRequest:
    whole_blocks = len(request.hash_ids) - 1
    tail = request.input_tokens - whole_blocks * old_block
    new_tail = max(1, round(tail * new_block / old_block))
    return replace(
        request,
        input_tokens=whole_blocks * new_block + new_tail,
        output_tokens=max(1, round(request.output_tokens * output_factor)),
    )


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"not a {name}: {value:g}; expected a number above 0")
