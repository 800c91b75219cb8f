"""The shape of a decoder-only model: what its costs and its KVCache depend on."""

from __future__ import annotations

from functools import cached_property

from msgspec import Struct


class ModelShape(Struct, frozen=True, dict=True):
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

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token in all layers, in bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes

    @cached_property
    def weight_bytes(self) -> int:
        return self.num_params * self.dtype_bytes

    @cached_property
    def linear_flops(self) -> float:
        """Two FLOP per weight, for each token that is computed."""
        return 2.0 * self.num_params

    @cached_property
    def attention_flops(self) -> float:
        """4·heads·head_dim·layers FLOP for each token that one token attends to."""
        return 4.0 * self.num_heads * self.head_dim * self.num_layers

    def prefill_flops(self, new_tokens: int, cached_tokens: int) -> float:
        """`linear_flops` a token, plus attention to n·p + n²/2 tokens."""
        attended = new_tokens * cached_tokens + new_tokens * new_tokens / 2
        return self.linear_flops * new_tokens + self.attention_flops * attended
