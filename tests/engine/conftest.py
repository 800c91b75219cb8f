"""What the engine's tests share: checkpoints made once, an arena full of garbage, and a driver of steps."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from ctypes import CDLL
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvasir.core.request import Sampling
from kvasir.engine.interface import Engine, ModelSpec, SampledToken, SequenceSlice, Slots
from kvasir.engine.random_model import make_checkpoint
from kvasir.engine.torch.config import quiet_transformers
from kvasir.engine.torch.first_calls import make_first_calls
from kvasir.engine.torch.kernels import Ops, TorchOps, load_ops
from kvasir.engine.torch.kernels.cpp_ops import Arithmetic, CppOps
from kvasir.engine.torch.kernels.load import PACKAGE
from kvasir.native.cpp import build

GREEDY = Sampling(temperature=0.0)
BLOCK_TOKENS = 16

MakeCheckpoint = Callable[..., Path]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


class Arena:
    """Slots of a node's arena, all bytes 0xFF (NaN), handed out in a scattered order."""

    def __init__(self, spec: ModelSpec, num_slots: int = 64, seed: int = 0) -> None:
        self.spec, self._stride = spec, spec.slot_bytes + 64
        self._generations, self._missing = np.zeros((2, num_slots), np.uint32)
        fd = os.memfd_create("arena")
        weakref.finalize(self, os.close, fd)
        os.ftruncate(fd, num_slots * self._stride)
        self._fd = fd
        self.slots = self.mapped()
        self.slots.memory[:] = 0xFF
        self._free = np.random.default_rng(seed).permutation(num_slots).tolist()

    def mapped(self) -> Slots:
        """The same slots at another address, as another process has them: a GPU's driver pins an address once."""
        memory = np.frombuffer(mmap.mmap(self._fd, 0), dtype=np.uint8)
        return Slots(memory, self._stride, self._generations, self._missing)

    def reserve(self, num_tokens: int) -> list[int]:
        """Pages for this many tokens; their generation grows."""
        pages = [self._free.pop() for _ in range(-(-num_tokens // self.spec.block_tokens))]
        self.slots.generations[pages] += 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        self._free.extend(pages)


class Sequence_:  # noqa: N801 (a sequence of the engine, not of typing)
    """One request driven by hand: its tokens, its pages, how many of its tokens have their KV in place."""

    def __init__(self, name: str, prompt: Sequence[int], pages: Sequence[int], sampling: Sampling = GREEDY) -> None:
        self.name, self.pages, self.sampling = name, list(pages), sampling
        self.tokens, self.num_prompt, self.computed = list(prompt), len(prompt), 0
        self.sampled: list[SampledToken] = []

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def slice(self, length: int | None = None) -> SequenceSlice:
        """The next `length` tokens without KV; the newest token's slice samples."""
        end = len(self.tokens) if length is None else min(len(self.tokens), self.computed + length)
        sampling = self.sampling if end == len(self.tokens) else None
        return SequenceSlice(self.name, self.tokens[self.computed : end], self.computed, self.pages, sampling)


async def step(engine: Engine, *work: Sequence_ | tuple[Sequence_, int]) -> None:
    """One step over these sequences, each as a whole or limited to a number of tokens."""
    pairs = [w if isinstance(w, tuple) else (w, None) for w in work]
    slices = [sequence.slice(length) for sequence, length in pairs]
    result = await engine.step(slices)
    assert set(result.tokens) == {s.request_id for s in slices if s.sampling is not None}
    for (sequence, _), part in zip(pairs, slices, strict=True):
        sequence.computed += len(part.tokens)
        if part.sampling is not None:
            sampled = result.tokens[sequence.name]
            sequence.sampled.append(sampled)
            sequence.tokens.append(sampled.token)


async def generate(engine: Engine, sequence: Sequence_, count: int, *, chunk: int | None = None) -> list[int]:
    """Run alone until `count` tokens are generated."""
    while len(sequence.generated) < count:
        await step(engine, sequence if chunk is None else (sequence, chunk))
    return sequence.generated


def random_tokens(count: int, *, seed: int = 0, vocab: int = 384) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(4, vocab, count).tolist()
    return tokens


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """`make_checkpoint` without the path; equal arguments share one directory."""
    made: dict[str, Path] = {}

    def make(**arguments: Any) -> Path:
        key = repr(sorted(arguments.items()))
        if key not in made:
            path = tmp_path_factory.mktemp(arguments.get("family", "llama"))
            made[key] = make_checkpoint(path, **arguments)
        return made[key]

    return make


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Callable[[Sequence[int]], torch.Tensor]]:
    """Of a checkpoint: transformers' own float32 logits [tokens, vocab] of a token list, in one piece, eager attention."""
    make_first_calls()
    loaded: dict[Path, Any] = {}

    def load(path: Path) -> Callable[[Sequence[int]], torch.Tensor]:
        if path not in loaded:
            with quiet_transformers():
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
            loaded[path] = model.eval()

        @torch.inference_mode()
        def logits(tokens: Sequence[int]) -> torch.Tensor:
            result: torch.Tensor = loaded[path](input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
            return result

        return logits

    return load


@pytest.fixture(params=["torch", *Arithmetic], ids=str)
def ops(request: pytest.FixtureRequest) -> Ops:
    """The implementations of the operations."""
    if request.param == "torch":
        return TorchOps("under test")
    best = load_ops("cpu", head_dim=16)
    if best.name != "cpp":
        pytest.skip(best.reason)
    library = build(PACKAGE)
    if request.param is Arithmetic.AMX and not CDLL(str(library)).kvasir_has_amx():
        pytest.skip("no AMX")
    return CppOps(library, arithmetic=request.param)
