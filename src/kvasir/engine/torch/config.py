"""A checkpoint's configuration, as far as a forward pass depends on it: windows and rotary embedding."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvasir.core.errors import ModelError
from kvasir.engine.interface import ModelSpec

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def load_config(spec: ModelSpec) -> Any:
    """The checkpoint's transformers configuration; ModelError where transformers refuses it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(spec.path)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"model {spec.path}: transformers refuses config.json: {first_line(error)}") from None


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """Each layer's sliding window, None for full attention. Other kinds of layers are refused."""
    fields = config.to_dict()
    num_layers: int = fields["num_hidden_layers"]
    window: int | None = fields.get("sliding_window")
    kinds = fields.get("layer_types")
    if kinds is None:
        return (window,) * num_layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelError(f"layer type {unknown[0]} is not supported; expected full_attention or sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check_rope(config: Any, max_model_len: int) -> None:
    """Refuse rotary embeddings that change a token's key with the length of its sequence: such KV cannot be shared."""
    rope = config.to_dict().get("rope_parameters") or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in by_layer_type or [rope]:
        kind = parameters.get("rope_type", "default")
        limit = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind in _LENGTH_DEPENDENT_ROPE and max_model_len > limit:
            raise ModelError(
                f"rope type {kind} changes keys with the sequence's length beyond {limit} tokens, got max_model_len "
                f"{max_model_len}; set it to {limit} or less"
            )


def rotary_tables(config: Any, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [num_positions, rotary_dim / 2], scaled as the configuration's rope type says."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
        inverse, scale = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)), 1.0
    else:
        inverse, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    angles = torch.arange(num_positions).float()[:, None] * inverse  # [positions, rotary_dim / 2]
    return angles.cos() * scale, angles.sin() * scale


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, advice or warnings from transformers within: our own errors say what matters."""
    from transformers.utils import logging as transformers_logging

    verbosity, had_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bar:
            transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one-line messages of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
