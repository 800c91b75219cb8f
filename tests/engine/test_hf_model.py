"""Architectures that run through transformers' own modelling code, and those that are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from kvasir.core.errors import ModelError
from kvasir.engine.checkpoint import read_spec
from kvasir.engine.interface import SequenceSlice, Stage, StreamRows
from kvasir.engine.torch.engine import TorchEngine
from kvasir.engine.torch.kernels import BatchLayout, Ops, TorchOps
from tests.engine.conftest import BLOCK_TOKENS, Arena, MakeCheckpoint, Sequence_, generate, random_tokens, step

PROMPT, LATE_PROMPT = random_tokens(53), random_tokens(90, seed=1)
COUNT = 12

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3_text", "granite", "mixtral", "olmo2", "phi3"])
async def test_greedy_tokens_are_those_of_transformers(
    family: str, ops: Ops, checkpoint: MakeCheckpoint, reference: Callable[[Path], Callable[[Sequence[int]], Tensor]]
) -> None:
    path = checkpoint(family=family)
    spec = read_spec(path, block_tokens=BLOCK_TOKENS)
    prefill, decode = TorchEngine(spec, ops=ops), TorchEngine(spec, ops=ops, device_kv_slots=32)
    arena = Arena(spec)
    prefill.attach(arena.slots)
    decode.attach(arena.slots)
    first, late = Sequence_("first", PROMPT, arena.reserve(80)), Sequence_("late", LATE_PROMPT, arena.reserve(112))
    await generate(prefill, first, 2)
    for _ in range(6):
        await step(prefill, (late, 17), first)
    while len(late.generated) < COUNT:
        await step(decode, first, late)
    for sequence in (first, late):
        best = reference(path)(sequence.tokens).argmax(-1).tolist()
        assert sequence.generated == best[sequence.num_prompt - 1 : -1]
        assert len(set(sequence.generated)) > 3
    await prefill.close()
    await decode.close()


REFUSED = {
    "gemma2": "soft-capped attention scores",
    "stablelm": "does not run with paged attention",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_would_be_wrong_is_refused_in_one_line(family: str, checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(ModelError, match=REFUSED[family]) as raised:
        TorchEngine(read_spec(checkpoint(family=family), block_tokens=BLOCK_TOKENS))
    assert "\n" not in str(raised.value)


def test_a_model_whose_own_attention_differs_is_refused(checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check compares logits: an attention of ours that ignored the model's scale would not pass."""
    real = TorchOps.attention

    def unscaled(self: TorchOps, q: Tensor, batch: BatchLayout, **arguments: Any) -> Tensor:
        return real(self, q, batch, **(arguments | {"scale": 1.0}))

    monkeypatch.setattr(TorchOps, "attention", unscaled)
    with pytest.raises(ModelError, match="gives other logits"):
        TorchEngine(read_spec(checkpoint(family="granite"), block_tokens=BLOCK_TOKENS), ops=TorchOps("under test"))


def test_a_lean_family_with_another_activation_runs_through_transformers(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint(family="llama", overrides={"hidden_act": "gelu"})
    engine = TorchEngine(read_spec(path, block_tokens=BLOCK_TOKENS))
    assert type(engine._model).__name__ == "HfModel"


def test_a_model_that_runs_through_transformers_has_no_stages(checkpoint: MakeCheckpoint) -> None:
    engine = TorchEngine(read_spec(checkpoint(family="granite"), block_tokens=BLOCK_TOKENS))
    arena = Arena(engine.spec)
    engine.attach(arena.slots)
    first = Stage(0, 1, reads=None, writes=StreamRows(arena.reserve(80), 0))
    with pytest.raises(ModelError, match="GraniteForCausalLM runs through transformers and has no stages"):
        engine.step_now([SequenceSlice("a", PROMPT, 0, arena.reserve(80), None, first)])
