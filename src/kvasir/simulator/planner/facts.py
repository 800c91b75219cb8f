"""What can be known of a trace before any simulation."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from msgspec import Struct

from kvasir.core.errors import TraceError
from kvasir.workload.trace import Trace

QUIET_SHARE = 0.125
"""The quietest stretch is this share of the trace's span."""


class TraceFacts(Struct, frozen=True):
    """`distinct_tokens` are of distinct prompt blocks: what an unlimited cache would hold.

    `has_sharing`: some block is in two prompts. `unknown_sharing` and `unknown_times` are what the trace's reader says of them,
    empty where they are known. The quietest stretch has `quiet_load` of the mean input tokens per second.
    """

    num_requests: int
    span_s: float
    distinct_tokens: int
    has_sharing: bool
    unknown_sharing: str
    unknown_times: str
    quiet_start_s: float
    quiet_s: float
    quiet_load: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.num_requests / self.span_s


def facts_of(trace: Trace) -> TraceFacts:
    """Raises TraceError for a trace that has no time in it, and so no load."""
    if trace.span_s <= 0:
        raise TraceError("all requests of the trace arrive at one time; a plan needs their rate")
    blocks = [block for request in trace.requests for block in request.hash_ids]
    distinct = len(set(blocks))
    start_s, load = _quietest(trace, trace.span_s * QUIET_SHARE)
    return TraceFacts(
        num_requests=len(trace.requests),
        span_s=trace.span_s,
        distinct_tokens=distinct * trace.block_tokens,
        has_sharing=distinct < len(blocks),
        unknown_sharing=_said_of("prefix sharing", trace),
        unknown_times=unknown_times(trace),
        quiet_start_s=start_s,
        quiet_s=trace.span_s * QUIET_SHARE,
        quiet_load=load,
    )


def unknown_times(trace: Trace) -> str:
    """What the trace's reader says of times that it drew; empty where the trace has its own."""
    return _said_of("arrival times", trace)


def _said_of(what: str, trace: Trace) -> str:
    return next((text for text in trace.unknown if text.startswith(what)), "")


def _quietest(trace: Trace, width_s: float) -> tuple[float, float]:
    """Start of the window, from one arrival on, with the fewest input tokens, and their rate over the trace's."""
    times = [request.arrival_s for request in trace.requests]
    tokens = [0, *accumulate(request.input_tokens for request in trace.requests)]
    inside = {
        at_s: tokens[bisect_left(times, at_s + width_s)] - tokens[bisect_left(times, at_s)]
        for at_s in dict.fromkeys(times)
        if at_s + width_s <= times[-1]
    }
    start_s = min(inside, key=lambda at_s: inside[at_s])  # the first of equals
    return start_s, inside[start_s] / width_s / (tokens[-1] / trace.span_s)
