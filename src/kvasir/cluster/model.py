"""Which model a config names, and what the rest of the house must know of it."""

from __future__ import annotations

from kvasir.cluster.config import BUILTIN_MODEL, ServeConfig
from kvasir.core.errors import ConfigError
from kvasir.engine import builtin_model
from kvasir.engine.checkpoint import LEAN_ARCHITECTURES, read_spec
from kvasir.engine.interface import ModelSpec
from kvasir.scheduling.strategy import strategy


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


def check_stages(config: ServeConfig, spec: ModelSpec) -> None:
    """Raises ConfigError where `--stages` asks for pipelines that this policy or this model does not make."""
    if config.stages == 1:
        return
    asked = f"--stages {config.stages}"
    if strategy(config.policy).max_stages == 1:
        raise ConfigError(f"{asked}: policy {config.policy!r} makes no pipelines; kvasir does")
    if config.engine == "torch" and spec.architecture not in LEAN_ARCHITECTURES:
        raise ConfigError(f"{asked}: {spec.architecture} cannot be split; {', '.join(LEAN_ARCHITECTURES)} can")
    if config.stages > spec.shape.num_layers:
        raise ConfigError(f"{asked}: {spec.name} has {spec.shape.num_layers} layers; give at most that")
    if spec.rows_per_slot == 0:
        need = -(-spec.row_bytes // spec.shape.kv_bytes_per_token // 16) * 16
        raise ConfigError(f"{asked}: a block must hold one token's {spec.row_bytes} bytes; give --block-tokens {need} or more")
