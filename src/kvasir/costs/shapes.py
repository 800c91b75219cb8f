"""The shapes of well-known dense models, by name; the sizes are those of their published config.json."""

from __future__ import annotations

from kvasir.costs.roofline import LLAMA3_70B
from kvasir.costs.shape import ModelShape


def _dense(
    layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocab: int, *, tied: bool = False
) -> ModelShape:
    """Head size 128, bf16. Weights are the matrices: attention, gated MLP, embedding and (unless `tied`) output."""
    attention = 2 * hidden * heads * 128 + 2 * hidden * kv_heads * 128
    per_layer = attention + 3 * hidden * intermediate
    return ModelShape(
        num_layers=layers,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        intermediate=intermediate,
        vocab=vocab,
        num_params=layers * per_layer + (1 if tied else 2) * vocab * hidden,
        dtype_bytes=2,
    )


_KVASIR_SMALL = ModelShape(
    num_layers=6,
    hidden=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate=768,
    vocab=4096,
    num_params=5_770_496,
    dtype_bytes=2,
)

SHAPES: dict[str, ModelShape] = {
    "llama3-8b": _dense(32, 4096, 32, 8, 14336, 128256),
    "llama3-70b": LLAMA3_70B,
    "llama3-405b": _dense(126, 16384, 128, 8, 53248, 128256),
    "mistral-7b": _dense(32, 4096, 32, 8, 14336, 32000),
    "qwen2.5-72b": _dense(80, 8192, 64, 8, 29568, 152064),
    "qwen3-0.6b": _dense(28, 1024, 16, 8, 3072, 151936, tied=True),
    "qwen3-8b": _dense(36, 4096, 32, 8, 12288, 151936),
    "qwen3-32b": _dense(64, 5120, 64, 8, 25600, 151936),
    "kvasir-small": _KVASIR_SMALL,
}
"""Name → shape. Another model is an inline table of the same sizes, or a checkpoint directory."""
