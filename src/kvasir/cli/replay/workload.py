"""From the TRACE argument to the requests that a server can take."""

from dataclasses import dataclass

from kvasir.cli.files import trace_from
from kvasir.core.errors import TraceError
from kvasir.workload import scaling
from kvasir.workload.trace import Trace, TraceRequest, read_trace


@dataclass(frozen=True, slots=True)
class Shape:
    """How the trace is cut and scaled; None leaves it as it is."""

    start_s: float = 0.0
    limit: int | None = None
    speed: float = 1.0
    scale_length: float = 1.0
    output_scale: float | None = None
    max_output: int | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """The requests that fit the model's context, and those that do not."""

    requests: tuple[TraceRequest, ...]
    skipped: tuple[TraceRequest, ...]


def load_trace(source: str) -> Trace:
    """A Mooncake trace file, or a synthetic trace by name. Raises TraceError or ConfigError."""
    return trace_from(source, read_trace)


def shaped(trace: Trace, shape: Shape) -> Trace:
    """The trace cut first, then scaled: `limit` and `start_s` speak of the trace as published."""
    if shape.start_s:
        trace = scaling.window(trace, start_s=shape.start_s)
    if shape.limit is not None:
        trace = scaling.limit(trace, shape.limit)
    trace = scaling.speed(trace, shape.speed)
    trace = scaling.scale_length(trace, shape.scale_length, output_factor=shape.output_scale)
    return trace if shape.max_output is None else scaling.cap_output(trace, shape.max_output)


def fitting(trace: Trace, max_model_len: int | None) -> Fit:
    """Split by whether prompt and output fit the context together. Raises TraceError if nothing does."""
    if max_model_len is None:
        return Fit(trace.requests, ())
    fits = tuple(r for r in trace.requests if r.input_tokens + r.output_tokens <= max_model_len)
    if not fits:
        shortest = min(r.input_tokens + r.output_tokens for r in trace.requests)
        raise TraceError(
            f"no request fits the model's context of {max_model_len} tokens, the shortest needs {shortest}; try --scale-length"
        )
    return Fit(fits, tuple(r for r in trace.requests if r.input_tokens + r.output_tokens > max_model_len))
