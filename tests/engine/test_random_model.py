"""Random checkpoints: reproducible, and with a tokenizer that text endpoints can use."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from kvasir.engine.checkpoint import read_spec
from kvasir.engine.random_model import make_checkpoint
from tests.engine.conftest import MakeCheckpoint


def test_the_same_seed_gives_the_same_weights(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    first = read_spec(checkpoint(family="llama"), block_tokens=16)
    again = read_spec(make_checkpoint(tmp_path / "again", family="llama"), block_tokens=16)
    other = read_spec(make_checkpoint(tmp_path / "other", family="llama", seed=1), block_tokens=16)
    assert first.identity == again.identity
    assert first.identity != other.identity


def test_any_text_survives_the_tokenizer_and_any_token_has_text(checkpoint: MakeCheckpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family="llama"))
    text = "Odin gave an eye: «mímir», 42 €\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 384
    assert all(tokenizer.decode([token]) for token in range(384))


def test_the_chat_template_marks_whose_turn_it_is(checkpoint: MakeCheckpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family="llama"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    assert tokenizer.encode(text)[0] == 1
    assert tokenizer.eos_token_id == 0
