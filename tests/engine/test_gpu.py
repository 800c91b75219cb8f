"""The engine on a GPU against transformers in float32 on the CPU, token for token; its contract's tests run there too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from kvasir.core.errors import ConfigError, ModelError
from kvasir.core.request import Sampling
from kvasir.engine.checkpoint import read_spec
from kvasir.engine.torch.engine import TorchEngine
from kvasir.engine.torch.kernels import KvLayout, TorchOps
from kvasir.engine.torch.place import Place, place
from tests.engine.conftest import (
    BLOCK_TOKENS,
    Arena,
    MakeCheckpoint,
    Sequence_,
    generate,
    needs_gpu,
    random_tokens,
)
from tests.engine.test_torch_engine import MODELS, is_greedy, one_life

Reference = Callable[[Path], Callable[[Sequence[int]], Tensor]]
Device = Literal["cpu", "cuda"]

PROMPT, LATE_PROMPT = random_tokens(53), random_tokens(90, seed=1)
COUNT = 16
HF_FAMILIES = ("gpt_neox", "gemma3_text", "granite", "mixtral", "olmo2", "phi3")


@needs_gpu
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("name", [*MODELS, *HF_FAMILIES])
async def test_greedy_tokens_are_those_of_transformers(
    name: str, kernels: str, checkpoint: MakeCheckpoint, reference: Reference
) -> None:
    """Prompts in odd chunks beside decoding, a cached prefix, and too few pages to keep everything on the GPU."""
    path = checkpoint(**MODELS.get(name, {"family": name}))
    ops = None if kernels == "triton" else TorchOps("under test")
    engine = TorchEngine(read_spec(path, block_tokens=BLOCK_TOKENS), device="cuda", ops=ops, device_kv_slots=19)
    assert engine.kernels.startswith(kernels)
    arena = Arena(engine.spec)
    engine.attach(arena.slots)
    for sequence in await one_life(engine, arena):
        assert len(set(sequence.generated)) > 3
        assert is_greedy(reference(path), sequence), sequence.name
    await engine.close()


@needs_gpu
@pytest.mark.parametrize(("prefill_on", "decode_on"), [("cuda", "cpu"), ("cpu", "cuda")])
async def test_kv_moves_between_a_gpu_and_a_cpu(
    prefill_on: Device, decode_on: Device, checkpoint: MakeCheckpoint, reference: Reference
) -> None:
    path = checkpoint(family="qwen3")
    spec = read_spec(path, block_tokens=BLOCK_TOKENS)
    prefill, decode = TorchEngine(spec, device=prefill_on), TorchEngine(spec, device=decode_on)
    arena = Arena(spec)
    prefill.attach(arena.mapped())
    decode.attach(arena.mapped())
    sequence = Sequence_("a", PROMPT, arena.reserve(80))
    await generate(prefill, sequence, 1, chunk=20)
    await generate(decode, sequence, COUNT)
    assert is_greedy(reference(path), sequence)
    await prefill.close()
    await decode.close()


@needs_gpu
@pytest.mark.parametrize("family", ["llama", "qwen3"])
async def test_bfloat16_stays_near_float32(family: str, checkpoint: MakeCheckpoint, reference: Reference) -> None:
    path = checkpoint(family=family, dtype="bfloat16")
    engine = TorchEngine(read_spec(path, block_tokens=BLOCK_TOKENS), device="cuda")
    arena = Arena(engine.spec)
    engine.attach(arena.slots)
    sequence = Sequence_("a", PROMPT, arena.reserve(80), Sampling(temperature=0.0, logprobs=1))
    await generate(engine, sequence, COUNT, chunk=29)
    expected = reference(path)(sequence.tokens)[len(PROMPT) - 1 : -1].log_softmax(-1)
    for sampled, row in zip(sequence.sampled, expected, strict=True):
        assert sampled.logprob == pytest.approx(float(row[sampled.token]), abs=0.25)
    await engine.close()


@needs_gpu
async def test_the_arena_is_let_go(checkpoint: MakeCheckpoint) -> None:
    """Or the next engine at this address could not pin it."""
    spec = read_spec(checkpoint(family="llama"), block_tokens=BLOCK_TOKENS)
    arena = Arena(spec)
    for _ in range(2):
        engine = TorchEngine(spec, device="cuda")
        engine.attach(arena.slots)
        await generate(engine, Sequence_("a", PROMPT, arena.reserve(80)), 2)
        await engine.close()


def test_without_a_gpu_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no GPU here; use --device cpu"):
        place("cuda")


def test_the_engines_of_a_machine_share_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [place("cuda", number=number, of=5) for number in range(5)]
    assert [p.device.index for p in found] == [0, 1, 0, 1, 0]
    assert [p.sharers for p in found] == [3, 2, 3, 2, 3]


def test_pages_take_what_the_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = KvLayout(2, 1, 16, 16, torch.float32)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 1000 * layout.slot_bytes})
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 100 * layout.slot_bytes)
    gpu = torch.device("cuda", 0)
    assert Place(gpu).pages_that_fit(layout, at_most=10_000) == 750
    assert Place(gpu, sharers=2).pages_that_fit(layout, at_most=10_000) == 325
    assert Place(gpu).pages_that_fit(layout, at_most=64) == 64
    with pytest.raises(ModelError, match=r"cuda:0 has no room for KV: .* shared by 9 instances"):
        Place(gpu, sharers=9).pages_that_fit(layout, at_most=64)


def test_memory_of_a_cpu_is_taken_as_it_is() -> None:
    from kvasir.engine.torch.pinned import host_memory

    memory = np.zeros(64, np.uint8)
    host_memory(memory, torch.device("cpu")).bytes[3] = 7
    assert memory[3] == 7
