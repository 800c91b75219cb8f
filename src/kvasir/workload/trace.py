"""Reading and writing request traces in the Mooncake JSONL format."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import msgspec

from kvasir.core.errors import TraceError

TRACE_BLOCK_TOKENS = 512
"""Tokens named by one hash id in the published Mooncake traces (FAST25-release/traces)."""

_COUNTS = ("input_length", "output_length")
_FIELDS = ("timestamp", *_COUNTS, "hash_ids")
_EXPECTED = {
    "timestamp": "milliseconds >= 0",
    "input_length": "an integer >= 1",
    "output_length": "an integer >= 1",
    "hash_ids": "a list of integers from 0 to 2**64 - 1",
}
_MAX_HASH_IDS = 2**64
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace; `hash_ids[i]` names block i of the prompt *together with everything before it*."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace sorted by arrival, and how many lines had to be moved for that (0 for a well-formed file).

    `num_dropped` counts records that are no requests to be served (failures in the log, turns without an answer).
    `unknown` names what the file does not say and its reader made up, for whoever reads figures that follow from it.
    """

    requests: tuple[TraceRequest, ...]
    block_tokens: int = TRACE_BLOCK_TOKENS
    num_unsorted: int = 0
    num_dropped: int = 0
    unknown: tuple[str, ...] = ()

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_trace(lines: Iterable[str | bytes], *, block_tokens: int = TRACE_BLOCK_TOKENS) -> Trace:
    """Parse Mooncake JSONL; blank lines are skipped, raises `TraceError` naming line, field, got and expected.

    Repair: timestamps out of order are sorted stably, and `num_unsorted` counts the lines that came earlier than a line
    before them, for the caller to warn about. Nothing else is repaired. Requests of
    one timestamp keep the order of their lines.
    """
    requests = list(_parsed(lines, block_tokens))
    if not requests:
        raise TraceError("trace is empty: got no requests, expected at least one JSON line")
    return in_order(requests, block_tokens=block_tokens)


def in_order(
    requests: Sequence[TraceRequest],
    *,
    block_tokens: int = TRACE_BLOCK_TOKENS,
    num_dropped: int = 0,
    unknown: tuple[str, ...] = (),
) -> Trace:
    """The trace of these requests, sorted stably by arrival; `num_unsorted` counts those that had to move."""
    num_unsorted = _count_unsorted(requests)
    if num_unsorted:
        requests = sorted(requests, key=attrgetter("arrival_s"))
    return Trace(tuple(requests), block_tokens, num_unsorted, num_dropped, unknown)


def trace_lines(requests: Sequence[TraceRequest]) -> Iterator[bytes]:
    """The requests as Mooncake JSONL, one newline-terminated line each; the inverse of `read_trace`."""
    encode = msgspec.json.encode
    for r in requests:
        line = _Line(round(r.arrival_s * 1e3, 3), r.input_tokens, r.output_tokens, r.hash_ids)
        yield encode(line) + b"\n"


def _parsed(lines: Iterable[str | bytes], block_tokens: int) -> Iterator[TraceRequest]:
    decode = msgspec.json.Decoder(_Line).decode
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = decode(text)
        except (msgspec.DecodeError, UnicodeError):
            raise TraceError(_complaint(number, text)) from None
        _check(line, number, block_tokens)
        yield TraceRequest(line.timestamp / 1e3, line.input_length, line.output_length, line.hash_ids)


def _check(line: _Line, number: int, block_tokens: int) -> None:
    num_blocks = -(-line.input_length // block_tokens)
    if (
        line.timestamp >= 0
        and math.isfinite(line.timestamp)
        and line.input_length >= 1
        and line.output_length >= 1
        and len(line.hash_ids) == num_blocks
        and min(line.hash_ids) >= 0
        and max(line.hash_ids) < _MAX_HASH_IDS
    ):
        return
    for name, value in msgspec.structs.asdict(line).items():
        if not _is_valid(name, value):
            raise TraceError(_field_complaint(number, name, value))
    raise TraceError(
        f"trace line {number}: hash_ids: got {len(line.hash_ids)} blocks, expected {num_blocks} "
        f"= ceil(input_length {line.input_length} / {block_tokens})"
    )


def _complaint(number: int, text: str | bytes) -> str:
    """Why a line did not decode; runs once, on the line that ends the reading."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError):
        return f"trace line {number}: got {_shown(text)}, expected a JSON object"
    if not isinstance(value, dict):
        return f"trace line {number}: got {_shown(value)}, expected a JSON object"
    for name in _FIELDS:
        if name not in value:
            return f"trace line {number}: {name}: got nothing, expected {_EXPECTED[name]}"
        if not _is_valid(name, value[name]):
            return _field_complaint(number, name, value[name])
    return f"trace line {number}: got {_shown(text)}, expected the fields {', '.join(_FIELDS)}"


def _is_valid(name: str, value: Any) -> bool:
    if name == "hash_ids":
        return isinstance(value, list | tuple) and all(_is_count(v) and 0 <= v < _MAX_HASH_IDS for v in value)
    if name in _COUNTS:
        return _is_count(value) and value >= 1
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _field_complaint(number: int, name: str, value: Any) -> str:
    return f"trace line {number}: {name}: got {_shown(value)}, expected {_EXPECTED[name]}"


def _shown(value: Any) -> str:
    text = repr(value.strip() if isinstance(value, str | bytes) else value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _count_unsorted(requests: Sequence[TraceRequest]) -> int:
    latest_s = 0.0
    count = 0
    for request in requests:
        count += request.arrival_s < latest_s
        latest_s = max(latest_s, request.arrival_s)
    return count
