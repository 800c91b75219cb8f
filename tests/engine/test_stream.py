"""Rows of the residual stream in the arena's slots, and what is refused as a stage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.core.request import Sampling
from kvasir.engine.interface import SequenceSlice, Stage, StreamRows
from kvasir.engine.stream import Stream
from kvasir.engine.torch.stream import read_rows, write_rows
from tests.engine.conftest import GREEDY, Arena
from tests.engine.test_fake_engine import SPEC

CPU = torch.device("cpu")
PER_SLOT = SPEC.rows_per_slot
LAYERS = SPEC.shape.num_layers


@given(st.permutations(range(8)), st.data())
@settings(max_examples=60, deadline=None)
def test_rows_follow_one_another_from_slot_to_slot(order: list[int], data: st.DataObject) -> None:
    arena, slots = Arena(SPEC, 8), order[:4]
    for index, slot in enumerate(slots):
        start = slot * arena.slots.stride
        arena.slots.memory[start : start + SPEC.slot_bytes] = np.arange(PER_SLOT).repeat(SPEC.row_bytes) + index * PER_SLOT
    first = data.draw(st.integers(0, 4 * PER_SLOT - 1))
    count = data.draw(st.integers(1, 4 * PER_SLOT - first))
    found = np.concatenate(list(Stream(arena.slots, SPEC).parts(StreamRows(slots, first), count)))
    assert found.shape == (count, SPEC.row_bytes)
    assert (found == np.arange(first, first + count)[:, None]).all()


def test_tensors_come_back_as_they_were_written_and_nothing_else_changes() -> None:
    arena = Arena(SPEC, 8)
    stream, rows = Stream(arena.slots, SPEC), StreamRows([5, 2, 7], PER_SLOT - 3)
    hidden = torch.randn(PER_SLOT + 9, SPEC.shape.hidden).to(torch.bfloat16)
    write_rows(stream, rows, hidden)
    assert torch.equal(read_rows(stream, rows, len(hidden), dtype=torch.bfloat16, device=CPU), hidden)
    assert (arena.slots.memory != 0xFF).sum() <= hidden.nbytes
    before = np.concatenate(list(stream.parts(StreamRows(rows.slots, 0), rows.first)))
    after = np.concatenate(list(stream.parts(StreamRows(rows.slots, rows.first + len(hidden)), 5)))
    assert (before == 0xFF).all()
    assert (after == 0xFF).all()


@pytest.mark.parametrize("count", [3, PER_SLOT + 3])
def test_what_was_read_is_a_copy(count: int) -> None:
    """A forward overwrites its residual stream."""
    arena = Arena(SPEC, 8)
    before = arena.slots.memory.copy()
    read_rows(Stream(arena.slots, SPEC), StreamRows([1, 2], 0), count, dtype=torch.bfloat16, device=CPU).zero_()
    assert (arena.slots.memory == before).all()


def refused(stage: Stage, *, tokens: int = 4, sampling: Sampling | None = None) -> str:
    """Why; empty for a stage that can be computed."""
    try:
        Stream(Arena(SPEC, 8).slots, SPEC).check(SequenceSlice("a", [1] * tokens, 0, [0], sampling, stage))
    except ValueError as error:
        return str(error)
    return ""


ROWS, OTHERS = StreamRows([3], 0), StreamRows([4], 0)


def test_the_stages_of_a_pipeline_are_not_refused() -> None:
    assert not refused(Stage(0, 1, None, ROWS))
    assert not refused(Stage(1, LAYERS, ROWS, None))
    assert not refused(Stage(1, LAYERS, ROWS, None), sampling=GREEDY)
    assert not refused(Stage(0, LAYERS, None, None), sampling=GREEDY)
    assert not refused(Stage(0, 1, None, StreamRows([3, 4], PER_SLOT)), tokens=PER_SLOT)


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        (Stage(1, 1, ROWS, OTHERS), "expected a stage within layers 0..2, got 1..1"),
        (Stage(-1, 1, ROWS, OTHERS), "expected a stage within layers 0..2, got -1..1"),
        (Stage(1, 3, ROWS, None), "expected a stage within layers 0..2, got 1..3"),
        (Stage(0, 1, ROWS, OTHERS), "expected rows to read in every stage but the first"),
        (Stage(1, 2, None, None), "expected rows to read in every stage but the first"),
        (Stage(0, 2, None, OTHERS), "expected rows to write in every stage but the last"),
        (Stage(0, 1, None, None), "expected rows to write in every stage but the last"),
        (Stage(0, 1, None, StreamRows([3, 8], 0)), "expected 4 rows in slots 0..7"),
        (Stage(1, 2, StreamRows([-1], 0), None), "expected 4 rows in slots 0..7"),
        (Stage(1, 2, StreamRows([3], -1), None), "expected 4 rows in slots 0..7"),
        (Stage(0, 1, None, StreamRows([3], PER_SLOT - 3)), "expected 4 rows in slots 0..7"),
        (Stage(0, 1, None, StreamRows([], 0)), "expected 4 rows in slots 0..7"),
        (Stage(0, 1, None, StreamRows([3, 0], 0)), "apart from those that are read and from the pages"),
    ],
)
def test_what_would_compute_something_else_than_the_model_is_refused(stage: Stage, reason: str) -> None:
    assert reason in refused(stage)


def test_a_stage_before_the_last_draws_no_token() -> None:
    assert "expected no token to be drawn" in refused(Stage(0, 1, None, ROWS), sampling=GREEDY)
