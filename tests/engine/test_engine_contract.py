"""One contract over every engine: where KV lies, how work is cut and what runs beside it change no token."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from itertools import chain
from typing import Literal

import numpy as np
import pytest

from kvasir.core.errors import KvLost
from kvasir.core.request import Sampling
from kvasir.costs.model import Counts, Seconds
from kvasir.engine.checkpoint import read_spec
from kvasir.engine.fake import FakeEngine
from kvasir.engine.interface import Engine, ModelSpec, SequenceSlice, Stage
from kvasir.engine.landing import LOST
from kvasir.engine.torch.engine import TorchEngine
from kvasir.engine.torch.kernels import TorchOps
from tests.engine.conftest import BLOCK_TOKENS, Arena, MakeCheckpoint, Sequence_, generate, needs_gpu, random_tokens, step
from tests.engine.pipeline import Pipeline

PROMPT = random_tokens(53)
COUNT = 12

# for each stage its layers and where its chunks end: none at a block's end, a later stage takes halves or several at once
TWO_STAGES = {(0, 1): (20, 29, 41, 53), (1, 4): (14, 29, 37, 53)}
FOUR_STAGES = {(0, 1): (20, 29, 41, 53), (1, 2): (29, 53), (2, 3): (14, 29, 37, 53), (3, 4): (29, 30, 45, 53)}

MakeEngine = Callable[[Arena], Engine]


class NoTime:
    """A cost model of a machine that takes no time."""

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        return 0.0

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        return 0.0

    def decode_steps_s(self, batch: Counts, context_tokens: Counts) -> Seconds:
        return np.zeros(len(batch))

    def transfer_s(self, num_bytes: int) -> float:
        return 0.0


@pytest.fixture(scope="module")
def spec(checkpoint: MakeCheckpoint) -> ModelSpec:
    return read_spec(checkpoint(family="llama", overrides={"num_hidden_layers": 4}), block_tokens=BLOCK_TOKENS)


ON_A_GPU = ["GPU", "GPU, few pages", "GPU, plain torch"]


@pytest.fixture(
    params=["fake", "in place", "device pages", "few device pages", *(pytest.param(name, marks=needs_gpu) for name in ON_A_GPU)]
)
async def make_engine(request: pytest.FixtureRequest, spec: ModelSpec) -> AsyncIterator[MakeEngine]:
    """Engines of one kind, each attached to an arena and closed at the end."""
    engines: list[Engine] = []

    def make(arena: Arena) -> Engine:
        device_slots = {"device pages": 64, "few device pages": 9, "GPU, few pages": 9}.get(request.param)
        ops = None if request.param in ("GPU", "GPU, few pages") else TorchOps("under test")
        if request.param == "fake":
            engine: Engine = FakeEngine(spec, NoTime())
        else:
            device: Literal["cpu", "cuda"] = "cuda" if request.param in ON_A_GPU else "cpu"
            engine = TorchEngine(spec, device=device, ops=ops, device_kv_slots=device_slots)
        engine.attach(arena.mapped())
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        await engine.close()


@pytest.fixture
def arena(spec: ModelSpec) -> Arena:
    return Arena(spec)


@pytest.fixture
async def expected(make_engine: MakeEngine, spec: ModelSpec) -> list[int]:
    """The prompt's continuation, computed in the plainest way."""
    arena = Arena(spec, seed=1)
    engine = make_engine(arena)
    return await generate(engine, Sequence_("plain", PROMPT, arena.reserve(80)), COUNT)


def new(arena: Arena, name: str = "a", sampling: Sampling | None = None) -> Sequence_:
    pages = arena.reserve(80)
    return Sequence_(name, PROMPT, pages) if sampling is None else Sequence_(name, PROMPT, pages, sampling)


@pytest.mark.parametrize("chunk", [1, 7, 16, 37])
async def test_a_chunked_prompt_gives_the_same_tokens(
    make_engine: MakeEngine, arena: Arena, expected: list[int], chunk: int
) -> None:
    assert await generate(make_engine(arena), new(arena), COUNT, chunk=chunk) == expected


async def test_a_slice_that_does_not_sample_gives_no_token(make_engine: MakeEngine, arena: Arena) -> None:
    engine, sequence = make_engine(arena), new(arena)
    result = await engine.step([sequence.slice(20)])
    assert result.tokens == {}
    assert result.seconds >= 0


@pytest.mark.parametrize("cached_blocks", [1, 3])
async def test_a_cached_prefix_gives_the_same_tokens(
    make_engine: MakeEngine, arena: Arena, expected: list[int], cached_blocks: int
) -> None:
    engine, first = make_engine(arena), new(arena)
    await generate(engine, first, 1)
    second = Sequence_("b", PROMPT, first.pages[:cached_blocks] + arena.reserve(80)[cached_blocks:])
    second.computed = cached_blocks * BLOCK_TOKENS
    assert await generate(engine, second, COUNT) == expected


async def test_another_engine_on_the_same_arena_continues(make_engine: MakeEngine, arena: Arena, expected: list[int]) -> None:
    prefill, decode = make_engine(arena), make_engine(arena)
    sequence = new(arena)
    await generate(prefill, sequence, 3)
    assert await generate(decode, sequence, COUNT) == expected


async def test_an_engine_sees_what_another_wrote_into_a_block_that_it_knows_in_part(
    make_engine: MakeEngine, arena: Arena, expected: list[int]
) -> None:
    """A decode instance fills the tail block of a prompt; the prefill instance, which wrote its beginning, reads it later."""
    prefill, decode = make_engine(arena), make_engine(arena)
    sequence = new(arena)
    await generate(prefill, sequence, 1)
    await generate(decode, sequence, COUNT - 2)
    assert await generate(prefill, sequence, COUNT) == expected


async def test_a_batch_of_chunks_and_decodes_gives_each_its_own_tokens(
    make_engine: MakeEngine, arena: Arena, expected: list[int]
) -> None:
    engine, early, late = make_engine(arena), new(arena), new(arena, "b")
    await generate(engine, early, 2)
    await step(engine, (late, 30), early)
    await step(engine, early, (late, 40))
    while len(late.generated) < COUNT:
        await step(engine, late, early) if len(early.generated) < COUNT else await step(engine, late)
    assert early.generated == expected
    assert late.generated == expected


async def test_a_preempted_sequence_is_recomputed_in_other_pages(
    make_engine: MakeEngine, arena: Arena, expected: list[int]
) -> None:
    engine, sequence = make_engine(arena), new(arena)
    await generate(engine, sequence, 5)
    arena.release(sequence.pages)
    other = Sequence_("other", random_tokens(70, seed=9), arena.reserve(80))
    await generate(engine, other, 2)
    sequence.pages, sequence.computed = arena.reserve(80), 0
    assert await generate(engine, sequence, COUNT, chunk=33) == expected


async def test_a_slot_that_was_reserved_anew_is_not_taken_for_its_old_content(
    make_engine: MakeEngine, arena: Arena, expected: list[int]
) -> None:
    """The copy that the first engine may hold of a slot is stale once another engine wrote other KV there."""
    engine, writer = make_engine(arena), make_engine(arena)
    old = Sequence_("old", random_tokens(53, seed=5), arena.reserve(80))
    await generate(engine, old, 2)
    arena.release(old.pages)
    sequence = new(arena)
    assert set(sequence.pages) == set(old.pages)
    await generate(writer, sequence, 1)
    assert await generate(engine, sequence, COUNT) == expected


async def test_only_the_pages_of_the_step_are_written(make_engine: MakeEngine, arena: Arena) -> None:
    engine, sequence = make_engine(arena), new(arena)
    before = arena.slots.memory.copy()
    await generate(engine, sequence, 3)
    changed = np.unique(np.flatnonzero(before != arena.slots.memory) // arena.slots.stride)
    assert set(changed.tolist()) <= set(sequence.pages)


@pytest.mark.parametrize("sampling", [Sampling(seed=3), Sampling(seed=3, temperature=0.7, top_p=0.9, top_k=40)])
async def test_a_seeded_request_resumed_elsewhere_continues_identically(
    make_engine: MakeEngine, arena: Arena, sampling: Sampling
) -> None:
    whole = await generate(make_engine(arena), new(arena, sampling=sampling), COUNT)
    sequence = new(arena, "resumed", sampling)
    await generate(make_engine(arena), sequence, 4)
    assert await generate(make_engine(arena), sequence, COUNT) == whole


@pytest.mark.parametrize("cached_blocks", [0, 2])
@pytest.mark.parametrize("stages", [TWO_STAGES, FOUR_STAGES], ids=["two stages", "four stages"])
async def test_a_prompt_in_stages_gives_the_same_tokens(
    make_engine: MakeEngine,
    arena: Arena,
    expected: list[int],
    stages: dict[tuple[int, int], tuple[int, ...]],
    cached_blocks: int,
) -> None:
    """Other sequences share the steps; later every engine computes on the same pages without a stage."""
    engines, decode, sequence = [make_engine(arena) for _ in stages], make_engine(arena), new(arena)
    if cached_blocks:
        await generate(decode, cached := new(arena), 1)
        sequence.pages[:cached_blocks] = cached.pages[:cached_blocks]
        sequence.computed = cached_blocks * BLOCK_TOKENS
    beside = [new(arena, f"beside {stage}") for stage in stages]
    await Pipeline(engines, arena, sequence, stages=stages).run(beside=beside)
    assert await generate(decode, sequence, COUNT) == expected
    for engine, other in zip(engines, beside, strict=True):
        assert await generate(engine, other, COUNT) == expected
        again = Sequence_("again", PROMPT, sequence.pages)
        again.tokens, again.computed = sequence.tokens[: len(PROMPT) + 1], len(PROMPT)
        assert await generate(engine, again, COUNT) == expected
        warm = Sequence_("warm", PROMPT, sequence.pages[:3] + arena.reserve(32))
        warm.computed = 3 * BLOCK_TOKENS
        assert await generate(engine, warm, COUNT) == expected
        arena.release(warm.pages[3:])


async def test_engines_that_change_their_stages_give_the_same_tokens(
    make_engine: MakeEngine, arena: Arena, expected: list[int]
) -> None:
    """What an engine holds of the first prompt's blocks is of other layers than it needs for the second."""
    one, other = make_engine(arena), make_engine(arena)
    first, second = new(arena), new(arena, "b")
    await Pipeline([one, other], arena, first, stages=TWO_STAGES).run()
    second.pages[:3], second.computed = first.pages[:3], 3 * BLOCK_TOKENS
    await Pipeline([other, one], arena, second, stages=TWO_STAGES).run()
    assert await generate(one, first, COUNT) == expected
    assert await generate(other, second, COUNT) == expected


async def test_a_stage_can_be_computed_again(make_engine: MakeEngine, arena: Arena, expected: list[int]) -> None:
    """As after a step in which blocks of another sequence were lost: what it read is still there."""
    engines = [make_engine(arena) for _ in FOUR_STAGES]
    pipeline = Pipeline(engines, arena, new(arena), stages=FOUR_STAGES)
    for stage, engine in enumerate(engines):
        part = pipeline.slice(stage, len(PROMPT))
        results = [await engine.step([part]) for _ in range(2)]
        assert [result.tokens[part.request_id].token for result in results if result.tokens] == expected[:1] * 2 * (stage == 3)
        pipeline.done[stage] = len(PROMPT)


async def test_a_stage_writes_its_pages_and_its_rows_only(make_engine: MakeEngine, arena: Arena) -> None:
    engines = [make_engine(arena) for _ in FOUR_STAGES]
    pipeline = Pipeline(engines, arena, new(arena), stages=FOUR_STAGES)
    before = arena.slots.memory.copy()
    await pipeline.run()
    changed = np.unique(np.flatnonzero(before != arena.slots.memory) // arena.slots.stride)
    assert set(changed.tolist()) <= {*pipeline.sequence.pages, *chain.from_iterable(pipeline.row_slots)}


async def test_an_engine_refuses_what_is_no_stage(make_engine: MakeEngine, arena: Arena) -> None:
    part = SequenceSlice("a", PROMPT, 0, new(arena).pages, None, Stage(0, 5, reads=None, writes=None))
    with pytest.raises(ValueError, match=r"a: expected a stage within layers 0\.\.4, got 0\.\.5"):
        await make_engine(arena).step([part])


async def test_a_stage_whose_cached_blocks_are_lost_is_named_and_the_others_go_on(
    make_engine: MakeEngine, arena: Arena, expected: list[int]
) -> None:
    engine, other, lost = make_engine(arena), new(arena), new(arena, "lost")
    lost.computed = BLOCK_TOKENS
    arena.slots.missing[lost.pages[0]] = LOST
    part = Pipeline([engine] * 2, arena, lost, stages=TWO_STAGES).slice(0, len(PROMPT))
    with pytest.raises(KvLost) as raised:
        await engine.step([other.slice(), part])
    assert raised.value.request_ids == ("lost",)
    assert await generate(engine, other, COUNT) == expected
