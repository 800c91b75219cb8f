"""Which format a trace file has, told by its first line."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from kvasir.core.errors import TraceError
from kvasir.workload import scaling
from kvasir.workload.readers import azure, burstgpt, sharegpt
from kvasir.workload.readers.table import columns_of
from kvasir.workload.readers.text import by_characters
from kvasir.workload.trace import Trace, read_trace

FORMATS = "Mooncake JSONL, Azure LLM inference CSV, BurstGPT CSV, ShareGPT JSON"

_BOM = b"\xef\xbb\xbf"
_SHOWN_BYTES = 60


@dataclass(frozen=True, slots=True)
class Options:
    """What formats without times or token counts need: arrivals per second, a seed, and a count of a text's tokens."""

    rate: float = 1.0
    seed: int = 0
    count_tokens: Callable[[str], int] = by_characters


def read_any(lines: Iterable[bytes], options: Options | None = None) -> Trace:
    """The trace in a file's lines, whatever its format, its clock 0 at the first arrival: some count from 1970.

    Raises TraceError, naming line and field, or the known formats.
    """
    trace = _read(lines, options or Options())
    start_s = trace.requests[0].arrival_s
    return scaling.window(trace, start_s=start_s) if start_s else trace


def _read(lines: Iterable[bytes], options: Options) -> Trace:
    first, whole = _peek(lines)
    if first.startswith(b"[") or (first.startswith(b"{") and b'"conversations"' in first):
        rng = random.Random(options.seed)
        return sharegpt.read(b"".join(whole), rate=options.rate, rng=rng, count_tokens=options.count_tokens)
    if first.startswith(b"{"):
        return read_trace(whole)
    columns = columns_of(first.decode("utf-8", "replace"))
    if columns >= azure.COLUMNS:
        return azure.read(whole)
    if columns >= burstgpt.COLUMNS:
        return burstgpt.read(whole)
    shown = repr(first[:_SHOWN_BYTES].decode("utf-8", "replace"))
    raise TraceError(f"trace line 1: got {shown}, which begins none of: {FORMATS}")


def _peek(lines: Iterable[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first line with something on it, stripped, and all lines, without a byte order mark."""
    rest = iter(lines)
    skipped: list[bytes] = []
    for line in rest:
        line = line if skipped else line.removeprefix(_BOM)
        skipped.append(line)
        if line.strip():
            return line.strip(), chain(skipped, rest)
    raise TraceError(f"trace is empty: got no requests, expected one of {FORMATS}")
