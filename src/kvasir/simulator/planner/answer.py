"""What a question ends in, and the words and figures that answers have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from kvasir.core.units import format_duration
from kvasir.simulator.planner.asking import Known
from kvasir.simulator.planner.runs import Figures, RunSpec


class Answer(Struct, frozen=True):
    """A few sentences in `text`, the same in numbers in `values` (JSON), and the runs behind it, a row of cells for each."""

    key: str
    question: str
    text: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    runs: tuple[RunSpec, ...] = ()
    values: dict[str, Any] = {}


Column = tuple[str, Callable[[RunSpec, Figures], str]]

LAYOUT: Column = ("layout", lambda run, f: run.name)
NODES: Column = ("nodes", lambda run, f: str(run.nodes))
LOAD: Column = ("load", lambda run, f: times(run.load))
EVENT: Column = ("event", lambda run, f: run.event.value)
PART: Column = ("trace", lambda run, f: run.part.value)
HIT_RATE: Column = ("hit rate", lambda run, f: percent(f.hit_rate))
REJECTED: Column = ("rejected", lambda run, f: f"{f.rejected:,}")
OUTCOME: tuple[Column, ...] = (
    ("requests in time", lambda run, f: percent(f.effective_requests)),
    ("tokens in time", lambda run, f: percent(f.effective_input_tokens)),
    ("TTFT p90", lambda run, f: seconds(f.ttft_p90_s)),
    ("TBT p90", lambda run, f: seconds(f.tbt_p90_s)),
)
"""Effective shares (requests, input tokens), then latencies of the requests that got an answer."""


def answer(
    key: str,
    question: str,
    text: str,
    *,
    runs: Sequence[RunSpec],
    known: Known,
    columns: Sequence[Column],
    values: dict[str, Any],
) -> Answer:
    """With a row for each run."""
    header = tuple(name for name, _ in columns)
    rows = tuple(tuple(cell(run, known[run]) for _, cell in columns) for run in runs)
    return Answer(key, question, text, header, rows, tuple(runs), values)


def times(load: float) -> str:
    return f"{load:.3g}x"


def percent(share: float) -> str:
    return f"{share:.1%}"


def seconds(value: float | None) -> str:
    return "-" if value is None else format_duration(value)


def size(num_bytes: int) -> str:
    """`512 GiB`, `2 TiB`: no more digits than are needed."""
    tib = num_bytes / 2**40
    return f"{tib:.3g} TiB" if tib >= 1 else f"{num_bytes / 2**30:.3g} GiB"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def sentences(*texts: str) -> str:
    """Those that are not empty."""
    return " ".join(filter(None, texts))
