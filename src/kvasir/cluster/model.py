"""Which model a config names, and what the rest of the house must know of it."""

from __future__ import annotations

from kvasir.cluster.config import BUILTIN_MODEL, ServeConfig
from kvasir.engine import builtin_model
from kvasir.engine.checkpoint import read_spec
from kvasir.engine.interface import ModelSpec


def model_spec(config: ServeConfig) -> ModelSpec:
    """What the checkpoint's own files say, with the config's dtype and limits. Raises ModelError."""
    builtin = config.model == BUILTIN_MODEL
    return read_spec(
        str(builtin_model.path()) if builtin else config.model,
        dtype=config.dtype,
        block_tokens=config.block_tokens,
        name=config.served_model_name or (BUILTIN_MODEL if builtin else None),
        max_model_len=config.max_model_len,
    )
