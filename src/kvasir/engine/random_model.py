"""Random-weight checkpoints in Hugging Face format, made on the fly for tests and benchmarks.

    python -m kvasir.engine.random_model DIR --size tiny

The weights are scaled so that such a model behaves like a sharp one: attention is peaked, so that a wrong position or a
wrong key shows in the output, and the largest logit stands clear of the second.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvasir.engine.torch.config import DTYPES, quiet_transformers

SIZES: dict[str, dict[str, int]] = {
    "nano": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 384,
        "max_position_embeddings": 1024,
    },
    "tiny": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 1376,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    },
    "small": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 4864,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    },
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
}
"""`tiny` (56M parameters) and `small` (415M) are the models of the engine's benchmarks, `8b` (as Llama 3's) of those on a GPU;
`nano` is for tests."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gpt_neox": {"num_key_value_heads": None},
    "gemma2": {},
    "gemma3_text": {"sliding_window": 32},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.2},
    "mixtral": {"sliding_window": None, "num_local_experts": 4},
    "olmo2": {},
    "phi3": {},
    "stablelm": {},
}
"""Families by transformers' `model_type`, with what differs from its defaults."""

_SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_END = 0  # id of <|end|>
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_checkpoint(
    path: str | Path,
    *,
    family: str = "llama",
    size: str = "nano",
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    tie: bool = False,
    vocab: int | None = None,
    overrides: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Path:
    """Write a checkpoint with random weights, a byte-level tokenizer and a chat template; the directory is returned.

    `overrides` are fields of the family's configuration, over those of `size`. The same arguments give the same bytes;
    on a GPU large models are drawn faster.
    """
    fields = SIZES[size] | FAMILIES[family] | ({} if vocab is None else {"vocab_size": vocab}) | (overrides or {})
    config = AutoConfig.for_model(
        family, tie_word_embeddings=tie, pad_token_id=None, bos_token_id=None, eos_token_id=_END, **fields
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers(), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _sharpen(model)
        model = model.to(DTYPES[dtype])
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(path, max_shard_size=math.ceil(total / shards) if shards > 1 else 1 << 40)
    _tokenizer(config.vocab_size).save_pretrained(path)
    return Path(path)


@torch.no_grad()
def _sharpen(model: PreTrainedModel) -> None:
    """Draw every weight anew: unit gain through each projection, more in queries and keys and in the output layer.

    A tied embedding is drawn as an output layer, or the model would only repeat its last token.
    """
    embedding, is_tied = model.get_input_embeddings().weight, model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            is_norm = name.endswith("weight") and parameter.mean() > 0.5
            center = 2.0 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
            parameter.normal_(center if is_norm else 0.0, 0.1)
            continue
        unit = 1 / math.sqrt(parameter.shape[-1])
        is_sharp = any(part in name for part in ("q_proj", "k_proj", "query_key_value", "lm_head", "embed_out"))
        if parameter is embedding:
            parameter.normal_(0.0, unit if is_tied else 1.0)
            continue
        parameter.normal_(0.0, 2 * unit if is_sharp else unit)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Bytes as tokens after the special ones; ids beyond are words, so that every id of the model decodes to text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (f"Ġw{i}" for i in range(vocab_size - len(_SPECIAL) - len(alphabet)))
    vocab = {token: i for i, token in enumerate((*_SPECIAL, *alphabet, *words))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_SPECIAL[_END], pad_token=_SPECIAL[_END], chat_template=_CHAT_TEMPLATE
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kvasir.engine.random_model", description="Make a random-weight checkpoint."
    )
    parser.add_argument("path", metavar="DIR")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llama")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where the weights are drawn: cpu or cuda")
    parser.add_argument("--tie", action="store_true", help="share the embedding with the output layer")
    args = parser.parse_args()
    make_checkpoint(**vars(args))
    print(f"{args.family} {args.size} {args.dtype} written to {args.path}")


if __name__ == "__main__":
    main()
