"""The shape of a decoder-only model: what its costs and its KVCache depend on."""

from __future__ import annotations

from msgspec import Struct


class ModelShape(Struct, frozen=True):
    """Sizes of a decoder-only transformer. `num_params` counts every weight once; `dtype_bytes` is 2 (bf16) or 4 (float32)."""

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    num_params: int
    dtype_bytes: int

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token in all layers, in bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes

    @property
    def weight_bytes(self) -> int:
        return self.num_params * self.dtype_bytes

    def prefill_flops(self, new_tokens: int, cached_tokens: int) -> float:
        """Two FLOP per weight and token, plus attention: 4·heads·head_dim·layers·(n·p + n²/2)."""
        attended = new_tokens * cached_tokens + new_tokens * new_tokens / 2
        return 2.0 * self.num_params * new_tokens + 4.0 * self.num_heads * self.head_dim * self.num_layers * attended
