"""Writes a Hugging Face checkpoint directory; each file appears whole or not at all."""

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tools.train_model.model import Shape, Weights
from tools.train_model.tokenizer import END_OF_TEXT, TURN_END, save_tokenizer, token_id


def export(folder: Path, shape: Shape, weights: Weights, tokenizer: Tokenizer) -> None:
    """Replaces the checkpoint in `folder`, file by file; the weights come last."""
    folder.mkdir(parents=True, exist_ok=True)
    stops = [token_id(tokenizer, TURN_END), token_id(tokenizer, END_OF_TEXT)]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as name:
        fresh = Path(name)
        _write_json(fresh / "config.json", _config(shape, stops))
        _write_json(fresh / "generation_config.json", {"do_sample": False, "eos_token_id": stops, "pad_token_id": stops[1]})
        save_tokenizer(tokenizer, fresh, shape.max_positions)
        stored = {k: w.detach().to(torch.bfloat16).contiguous() for k, w in weights.items()}
        save_file(stored, fresh / "model.safetensors", metadata={"format": "pt"})
        for path in sorted(fresh.iterdir(), key=lambda p: p.suffix == ".safetensors"):
            os.chmod(path, 0o644)
            path.replace(folder / path.name)


def _config(shape: Shape, stops: list[int]) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": stops,
        "pad_token_id": stops[1],
        "torch_dtype": "bfloat16",
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
