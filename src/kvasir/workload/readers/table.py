"""Traces as CSV: columns by name, one complaint for a field, and requests that share nothing."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from kvasir.core.errors import TraceError
from kvasir.workload.trace import TRACE_BLOCK_TOKENS, TraceRequest

T = TypeVar("T")

NO_HASH_IDS = "prefix sharing: no hash_ids in this format, so every prompt counts as new"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table; asking for a field checks it."""

    number: int
    fields: dict[str, str]

    def get(self, name: str, parse: Callable[[str], T | None], expected: str) -> T:
        """The field by `parse`, which gives None for what is not right. Raises TraceError."""
        text = (self.fields.get(name) or "").strip()
        value = parse(text)
        if value is None:
            raise TraceError(f"trace line {self.number}: {name}: got {text[:60]!r}, expected {expected}")
        return value

    def tokens(self, name: str, *, least: int = 1) -> int:
        """A count of tokens."""
        return self.get(name, lambda text: count_of(text, least), f"an integer >= {least}")


def columns_of(line: str) -> set[str]:
    """The column names in a header line; none in what is not CSV."""
    try:
        return {name.strip() for name in next(csv.reader([line]), [])}
    except csv.Error:
        return set()


def rows(lines: Iterable[bytes]) -> Iterator[Row]:
    """The rows below the header; empty lines are skipped. Raises TraceError for what is not text."""
    reader = csv.reader(_decoded(lines))
    header: list[str] = []
    try:
        for values in reader:
            if not any(value.strip() for value in values):
                continue
            if header:
                yield Row(reader.line_num, dict(zip(header, values, strict=False)))
            else:
                header = [name.strip() for name in values]
    except csv.Error as error:
        raise TraceError(f"trace line {reader.line_num}: {error}, expected CSV") from None


def count_of(text: str, least: int) -> int | None:
    """A whole number, also when a tool wrote it as 12.0."""
    value = number_of(text)
    return int(value) if value is not None and value >= least and value == int(value) else None


def number_of(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class FreshBlocks:
    """Hash ids that nobody else has."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = 0

    def take(self, num_blocks: int) -> tuple[int, ...]:
        first = self._next
        self._next += num_blocks
        return tuple(range(first, self._next))

    def request(self, arrival_s: float, input_tokens: int, output_tokens: int) -> TraceRequest:
        """A request whose prompt nobody else has."""
        return TraceRequest(arrival_s, input_tokens, output_tokens, self.take(-(-input_tokens // TRACE_BLOCK_TOKENS)))


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode()
        except UnicodeDecodeError:
            raise TraceError(f"trace line {number}: got {line[:40]!r}, expected text in UTF-8") from None
