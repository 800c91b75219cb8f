"""The lean forward against transformers, token for token in float32."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvasir.core.errors import ModelError
from kvasir.core.request import Sampling
from kvasir.engine.checkpoint import read_spec
from kvasir.engine.interface import SequenceSlice
from kvasir.engine.torch import priority
from kvasir.engine.torch.engine import TorchEngine
from kvasir.engine.torch.kernels import Ops, TorchOps
from tests.engine.conftest import BLOCK_TOKENS, GREEDY, Arena, MakeCheckpoint, Sequence_, generate, random_tokens, step
from tests.engine.pipeline import Pipeline

Reference = Callable[[Path], Callable[[Sequence[int]], Tensor]]

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama, tied, two shards": {"family": "llama", "tie": True, "shards": 2},
    "llama, biases": {"family": "llama", "overrides": {"attention_bias": True, "mlp_bias": True}},
    "llama, llama3 rope": {
        "family": "llama",
        "overrides": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    },
    "llama, linear rope": {
        "family": "llama",
        "overrides": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    },
    "mistral": {"family": "mistral"},
    "mistral, window 24": {"family": "mistral", "overrides": {"sliding_window": 24}},
    "qwen2": {"family": "qwen2"},
    "qwen2, window in some layers": {
        "family": "qwen2",
        "overrides": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    },
    "qwen3, tied": {"family": "qwen3", "tie": True},
    "qwen3, yarn rope": {
        "family": "qwen3",
        "overrides": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    },
}
PROMPT, LATE_PROMPT = random_tokens(53), random_tokens(90, seed=1)
COUNT = 16


@asynccontextmanager
async def opened(path: Path, *, num_slots: int = 64, **arguments: Any) -> AsyncIterator[tuple[TorchEngine, Arena]]:
    """An engine on the checkpoint with an arena attached."""
    engine = TorchEngine(read_spec(path, block_tokens=BLOCK_TOKENS), **arguments)
    arena = Arena(engine.spec, num_slots)
    engine.attach(arena.slots)
    try:
        yield engine, arena
    finally:
        await engine.close()


def is_greedy(logits: Callable[[Sequence[int]], Tensor], sequence: Sequence_) -> bool:
    """Whether each generated token is the most likely one after all before it."""
    best = logits(sequence.tokens).argmax(-1).tolist()
    return bool(sequence.generated == best[sequence.num_prompt - 1 : -1])


async def one_life(engine: TorchEngine, arena: Arena) -> list[Sequence_]:
    """Whole prompts, odd chunks, mixed batches, a cached prefix, all at scattered pages."""
    first = Sequence_("first", PROMPT, arena.reserve(80))
    chunked = Sequence_("chunked", LATE_PROMPT, arena.reserve(112))
    await generate(engine, first, 3)
    for _ in range(6):
        await step(engine, (chunked, 17), first)
    cached = Sequence_("cached", PROMPT[:32] + LATE_PROMPT[:9], first.pages[:2] + arena.reserve(48))
    cached.computed = 32
    while len(cached.generated) < COUNT:
        await step(engine, first, cached, chunked)
    return [first, chunked, cached]


@pytest.mark.parametrize("name", MODELS)
async def test_greedy_tokens_are_those_of_transformers(
    name: str, ops: Ops, checkpoint: MakeCheckpoint, reference: Reference
) -> None:
    """One life of an arena: whole prompts, odd chunks, mixed batches, a cached prefix, all at scattered pages."""
    path = checkpoint(**MODELS[name])
    async with opened(path, ops=ops) as (engine, arena):
        logits = reference(path)
        for sequence in await one_life(engine, arena):
            assert len(set(sequence.generated)) > 3, "a model that repeats itself proves little"
            assert is_greedy(logits, sequence), sequence.name


async def test_logits_are_those_of_transformers(ops: Ops, checkpoint: MakeCheckpoint, reference: Reference) -> None:
    path = checkpoint(family="qwen3", tie=True)
    async with opened(path, ops=ops) as (engine, arena):
        sampling = Sampling(temperature=0.0, logprobs=384)
        sequence = Sequence_("a", PROMPT, arena.reserve(80), sampling)
        await generate(engine, sequence, 4)
        expected = reference(path)(sequence.tokens)[len(PROMPT) - 1 : -1].log_softmax(-1)
        for sampled, row in zip(sequence.sampled, expected, strict=True):
            tokens, logprobs = zip(*sampled.top, strict=True)
            assert torch.tensor(logprobs).sub(row[list(tokens)]).abs().max() < 2e-4
            assert sampled.logprob == pytest.approx(float(row[sampled.token]), abs=2e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
async def test_bfloat16_stays_near_float32(family: str, ops: Ops, checkpoint: MakeCheckpoint, reference: Reference) -> None:
    """The chosen tokens are among the likeliest of float32, and their logprobs are near."""
    path = checkpoint(family=family, dtype="bfloat16")
    async with opened(path, ops=ops) as (engine, arena):
        assert engine.spec.dtype == "bfloat16"
        sequence = Sequence_("a", PROMPT, arena.reserve(80), Sampling(temperature=0.0, logprobs=1))
        await generate(engine, sequence, COUNT, chunk=29)
        expected = reference(path)(sequence.tokens)[len(PROMPT) - 1 : -1].log_softmax(-1)
        for sampled, row in zip(sequence.sampled, expected, strict=True):
            assert sampled.logprob == pytest.approx(float(row[sampled.token]), abs=0.25)


async def test_pages_of_float32_checkpoints_can_hold_bfloat16(checkpoint: MakeCheckpoint, reference: Reference) -> None:
    path = checkpoint(family="llama")
    spec = read_spec(path, dtype="bfloat16", block_tokens=BLOCK_TOKENS)
    engine = TorchEngine(spec)
    arena = Arena(spec)
    engine.attach(arena.slots)
    sequence = Sequence_("a", PROMPT, arena.reserve(80))
    await generate(engine, sequence, 4)
    await engine.close()
    assert is_greedy(reference(path), sequence)


async def test_a_stage_at_a_time_gives_the_logits_of_the_whole(checkpoint: MakeCheckpoint) -> None:
    """Layers [0, 1) and [1, 3) one after the other are the model."""
    from kvasir.engine.torch.config import load_config
    from kvasir.engine.torch.kernels import BatchLayout, KvLayout, KvView
    from kvasir.engine.torch.kv import InPlaceKv
    from kvasir.engine.torch.lean import LeanModel, SampleRows

    spec = read_spec(checkpoint(family="llama"), block_tokens=BLOCK_TOKENS)
    model = LeanModel(spec, load_config(spec), ops=TorchOps("under test"), device=torch.device("cpu"))
    kv = InPlaceKv(KvView.empty(4, KvLayout(3, 2, 16, BLOCK_TOKENS, torch.float32)))
    batch = BatchLayout.build([53], [53], block_tables=[[3, 1, 0, 2]], block_tokens=BLOCK_TOKENS)
    last = BatchLayout.build([1], [53], block_tables=[[3, 1, 0, 2]], block_tokens=BLOCK_TOKENS)
    sample, tokens = SampleRows(torch.tensor([52]), last), torch.tensor(PROMPT)
    with torch.inference_mode():
        whole = model.forward(tokens, batch, kv=kv, sample=sample)
        between = model.run_layers(model.embed(tokens), batch, kv=kv, sample=sample, last=1)
        assert between is not None
        assert between.shape == (53, 64)
        hidden = model.run_layers(between, batch, kv=kv, sample=sample, first=1)
        assert hidden is not None
        assert whole is not None
        torch.testing.assert_close(model.logits(hidden), whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_stages_give_the_very_logprobs_of_a_prompt_in_the_same_chunks(
    dtype: str, ops: Ops, checkpoint: MakeCheckpoint
) -> None:
    async with opened(checkpoint(family="qwen3", dtype=dtype), ops=ops) as (engine, arena):
        whole, staged = (Sequence_(name, PROMPT, arena.reserve(80), Sampling(temperature=0.0, logprobs=384)) for name in "ab")
        await step(engine, (whole, 20))
        await step(engine, whole)
        await Pipeline([engine] * 3, arena, staged, stages={(0, 1): (20, 53), (1, 2): (20, 53), (2, 3): (20, 53)}).run()
        assert staged.sampled == whole.sampled


async def test_a_step_does_not_block_the_event_loop(checkpoint: MakeCheckpoint) -> None:
    async with opened(checkpoint(family="llama")) as (engine, arena):
        sequence = Sequence_("a", LATE_PROMPT, arena.reserve(112))
        task = asyncio.create_task(engine.step([sequence.slice()]))
        turns = 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns > 3


def _threads() -> dict[int, str]:
    """Names of this process's threads."""
    return {int(task.name): (task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}


async def test_low_priority_is_the_engine_threads_alone(checkpoint: MakeCheckpoint) -> None:
    async with opened(checkpoint(family="llama"), low_priority=True) as (engine, arena):
        sequence = Sequence_("a", LATE_PROMPT, arena.reserve(112))
        await engine.step([sequence.slice()])
        inside = await asyncio.get_running_loop().run_in_executor(engine._thread, threading.get_native_id)
        threads = _threads()
        of_engine = {thread for thread, name in threads.items() if name == priority.NAME}
        assert inside in of_engine
        assert threading.get_native_id() not in of_engine
        for thread in threads:
            assert (os.sched_getscheduler(thread) == os.SCHED_IDLE) == (thread in of_engine)


async def test_a_model_loads_at_normal_priority(checkpoint: MakeCheckpoint) -> None:
    seen: list[int] = []
    spec = read_spec(checkpoint(family="llama"), block_tokens=BLOCK_TOKENS)
    engine = await TorchEngine.load(
        spec, low_priority=True, on_progress=lambda share, what: seen.append(os.sched_getscheduler(0))
    )
    await engine.close()
    assert set(seen) == {os.SCHED_OTHER}


async def test_loading_reports_its_progress(checkpoint: MakeCheckpoint) -> None:
    seen: list[tuple[float, str]] = []
    spec = read_spec(checkpoint(family="llama"), block_tokens=BLOCK_TOKENS)
    engine = await TorchEngine.load(spec, on_progress=lambda fraction, text: seen.append((fraction, text)))
    await engine.close()
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert seen[-1] == (1.0, "model loaded")


@pytest.mark.parametrize(
    ("start", "pages", "message"), [(1020, [0] * 65, "at most 1024"), (0, [64], "pages in 0..63"), (0, [-1], "pages in 0..63")]
)
async def test_a_step_outside_of_model_or_arena_is_refused(
    checkpoint: MakeCheckpoint, start: int, pages: list[int], message: str
) -> None:
    async with opened(checkpoint(family="llama")) as (engine, _):
        with pytest.raises(ValueError, match=message):
            await engine.step([SequenceSlice("a", [5] * 8, start, pages, GREEDY)])


async def test_a_step_that_failed_leaves_the_engine_usable(checkpoint: MakeCheckpoint, reference: Reference) -> None:
    path = checkpoint(family="llama")
    async with opened(path, device_kv_slots=32) as (engine, arena):
        sequence = Sequence_("a", PROMPT, arena.reserve(80))
        with pytest.raises(IndexError):
            await engine.step([SequenceSlice("a", [10_000_000], 0, sequence.pages, GREEDY)])
        await generate(engine, sequence, 3)
        assert is_greedy(reference(path), sequence)


def rewrite(path: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    for file in path.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"), "no tensor model.layers.1.self_attn.k_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "no lm_head.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), r"expected \(64,\) for model.norm.weight"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(97, 64)}), r"expected \(192, 64\)"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    path = rewrite(checkpoint(family="llama"), tmp_path, change)
    with pytest.raises(ModelError, match=message) as raised:
        TorchEngine(read_spec(path, block_tokens=BLOCK_TOKENS))
    assert "\n" not in str(raised.value)


def test_rope_that_depends_on_the_sequences_length_is_refused(checkpoint: MakeCheckpoint) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 512}
    path = checkpoint(family="llama", overrides={"rope_parameters": dynamic})
    with pytest.raises(ModelError, match=r"rope type dynamic .* set it to 512 or less"):
        TorchEngine(read_spec(path, block_tokens=BLOCK_TOKENS))
    TorchEngine(read_spec(path, block_tokens=BLOCK_TOKENS, max_model_len=512))


async def test_an_arena_is_attached_once(checkpoint: MakeCheckpoint) -> None:
    async with opened(checkpoint(family="llama")) as (engine, arena):
        with pytest.raises(RuntimeError, match="attached already"):
            engine.attach(arena.slots)


def test_tokens_may_come_as_a_numpy_array(checkpoint: MakeCheckpoint) -> None:
    engine = TorchEngine(read_spec(checkpoint(family="llama"), block_tokens=BLOCK_TOKENS))
    arena = Arena(engine.spec)
    engine.attach(arena.slots)
    pages = arena.reserve(80)
    lists = engine.step_now([SequenceSlice("a", PROMPT, 0, pages, GREEDY)])
    arrays = engine.step_now([SequenceSlice("a", np.array(PROMPT, dtype=np.uint32), 0, pages, GREEDY)])
    assert lists.tokens == arrays.tokens
