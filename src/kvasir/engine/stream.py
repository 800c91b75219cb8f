"""The residual stream of a chunked pipeline in the arena: where its rows lie, and what cannot be a stage.

Which slots hold rows, and when they are complete, is the callers' business: an engine reads and writes where a slice says.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvasir.engine.interface import ModelSpec, SequenceSlice, Slots, Stage, StreamRows

Rows = npt.NDArray[np.uint8]


class Stream:
    """An arena's slots as rows of `spec.row_bytes`."""

    def __init__(self, slots: Slots, spec: ModelSpec) -> None:
        self._num_layers = spec.shape.num_layers
        self._per_slot = spec.rows_per_slot
        count, used = len(slots.memory) // slots.stride, spec.rows_per_slot * spec.row_bytes
        memory = slots.memory[: count * slots.stride].reshape(count, slots.stride)[:, :used]
        self._rows = memory.reshape(count, spec.rows_per_slot, spec.row_bytes)  # a view

    def parts(self, rows: StreamRows, count: int) -> Iterator[Rows]:
        """The first `count` rows, views [n, row_bytes] of the arena: a slot's rows together, in order."""
        row, end = rows.first, rows.first + count
        while row < end:
            index, start = divmod(row, self._per_slot)
            part = self._rows[rows.slots[index], start : start + end - row]
            yield part
            row += len(part)

    def check(self, s: SequenceSlice) -> None:
        """Raise ValueError for a stage that would not be part of the model, or on foreign memory.

        What a stage reads must outlast the step, which may have to be computed again: it may not write there.
        """
        if s.stage is None:
            return
        problem = self._problem_of(s, s.stage)
        if problem is not None:
            raise ValueError(f"step: {s.request_id}: {problem}")

    def _problem_of(self, s: SequenceSlice, stage: Stage) -> str | None:
        read, written = _slots_of(stage.reads), _slots_of(stage.writes)
        if not 0 <= stage.first < stage.last <= self._num_layers:
            return f"expected a stage within layers 0..{self._num_layers}, got {stage.first}..{stage.last}"
        if (stage.first == 0) != (stage.reads is None):
            return f"expected rows to read in every stage but the first, got layers {stage.first}..{stage.last}"
        if (stage.last == self._num_layers) != (stage.writes is None):
            return f"expected rows to write in every stage but the last, got layers {stage.first}..{stage.last}"
        if s.sampling is not None and stage.writes is not None:
            return "expected no token to be drawn but after the last stage"
        if written & (read | set(s.pages)):
            return "expected rows to write apart from those that are read and from the pages"
        for rows in (stage.reads, stage.writes):
            if rows is not None and not self._holds(rows, len(s.tokens)):
                return f"expected {len(s.tokens)} rows in slots 0..{len(self._rows) - 1}, got {rows}"
        return None

    def _holds(self, rows: StreamRows, count: int) -> bool:
        is_inside = all(0 <= slot < len(self._rows) for slot in rows.slots)
        return is_inside and 0 <= rows.first <= len(rows.slots) * self._per_slot - count


def _slots_of(rows: StreamRows | None) -> set[int]:
    return set() if rows is None else set(rows.slots)
