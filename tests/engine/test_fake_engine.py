"""The fake engine's time, and that its tokens notice wrong KV."""

from __future__ import annotations

import numpy as np
import pytest

from kvasir.costs.model import Counts, Seconds
from kvasir.costs.shape import ModelShape
from kvasir.engine.fake import FakeEngine
from kvasir.engine.interface import ModelSpec, StreamRows
from kvasir.engine.stream import Stream
from tests.engine.conftest import Arena, Sequence_, generate, random_tokens, step
from tests.engine.pipeline import Pipeline

SPEC = ModelSpec(
    name="fake",
    path="",
    identity="fake",
    architecture="fake",
    shape=ModelShape(2, 64, 4, 2, 16, 96, 384, 1000, 2),
    dtype="bfloat16",
    layout="fake",
    block_tokens=16,
    max_model_len=1024,
    eos_token_ids=tuple(range(100)),
)


class Costs:
    """A millisecond for each new token, a tenth for each cached one; ten a decode step and a tenth for each context token."""

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        return 1e-3 * new_tokens + 1e-4 * cached_tokens

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        return 1e-2 + 1e-4 * context_tokens

    def decode_steps_s(self, batch: Counts, context_tokens: Counts) -> Seconds:
        return np.asarray(1e-2 + 1e-4 * context_tokens)

    def transfer_s(self, num_bytes: int) -> float:
        return 0.0


def attached() -> tuple[FakeEngine, Arena, list[float]]:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    engine, arena = FakeEngine(SPEC, Costs(), sleep=sleep), Arena(SPEC)
    engine.attach(arena.slots)
    return engine, arena, slept


async def test_a_step_takes_the_predicted_time_of_its_chunks_and_its_decode_batch() -> None:
    engine, arena, slept = attached()
    first, second = (Sequence_(name, random_tokens(40), arena.reserve(64)) for name in "ab")
    await step(engine, first)
    await step(engine, (second, 30), first)
    await step(engine, second, first)
    assert slept == pytest.approx([0.040, 0.030 + 0.010 + 0.0041, 0.010 + 0.003 + 0.010 + 0.0042])


async def test_an_end_of_sequence_token_is_never_drawn() -> None:
    engine, arena, _ = attached()
    tokens = await generate(engine, Sequence_("a", random_tokens(40), arena.reserve(300)), 200)
    assert min(tokens) >= 100
    assert len(set(tokens)) > 100


@pytest.mark.parametrize("block", [0, 1, 2])
async def test_one_wrong_block_changes_the_next_token(block: int) -> None:
    engine, arena, _ = attached()
    sequence, other = Sequence_("a", random_tokens(60), arena.reserve(64)), Sequence_("b", random_tokens(60, seed=1), [])
    other.pages = arena.reserve(64)
    await generate(engine, other, 1)
    await step(engine, (sequence, 59))
    right = await engine.step([sequence.slice()])
    sequence.pages[block] = other.pages[block]
    wrong = await engine.step([sequence.slice()])
    assert right.tokens["a"] != wrong.tokens["a"]


async def test_a_stage_takes_its_layers_share_of_a_chunks_time() -> None:
    engine, arena, slept = attached()
    sequence = Sequence_("a", random_tokens(61), arena.reserve(64))
    await Pipeline([engine, engine], arena, sequence, stages={(0, 1): (60, 61), (1, 2): (60, 61)}).run()
    assert slept == pytest.approx([0.030, 0.030, 0.0035, 0.0035])


async def last_stage(engine: FakeEngine, arena: Arena, *, wrong_row: int | None = None, pages: list[int] | None = None) -> int:
    """The token that it draws, in two chunks, when a row changed on its way or when it knows other pages than the first."""
    sequence = Sequence_("a", random_tokens(60), arena.reserve(64))
    pipeline = Pipeline([engine, engine], arena, sequence, stages={(0, 1): (60,), (1, 2): (40, 60)})
    first = pipeline.slice(0, 60)
    await engine.step([first])
    if wrong_row is not None and first.stage is not None and first.stage.writes is not None:
        rows = StreamRows(first.stage.writes.slots, first.stage.writes.first + wrong_row)
        next(Stream(arena.slots, SPEC).parts(rows, 1))[:] ^= 1
    sequence.pages = pages or sequence.pages
    await engine.step([pipeline.slice(1, 40)])
    pipeline.done[1] = 40
    result = await engine.step([pipeline.slice(1, 60)])
    return result.tokens["a"].token


@pytest.mark.parametrize("row", [0, 17, 31, 39, 40, 58, 59])
async def test_one_wrong_row_changes_the_next_token(row: int) -> None:
    engine, arena, _ = attached()
    assert await last_stage(engine, arena, wrong_row=row) != await last_stage(engine, arena)


async def test_stages_that_do_not_share_their_pages_give_another_token() -> None:
    engine, arena, _ = attached()
    assert await last_stage(engine, arena, pages=arena.reserve(64)) != await last_stage(engine, arena)
