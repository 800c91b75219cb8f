"""The operations in plain torch: any device, any head size; the meaning that the C++ kernels are held to."""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor

from kvasir.engine.torch.kernels.batch import BatchLayout
from kvasir.engine.torch.kernels.layout import KvView
from kvasir.engine.torch.kernels.ops import PackedWeight, TokenCopies


class TorchOps:
    """`Ops` for where there are no C++ kernels: no compiler, an unusual head size, float16, or a GPU."""

    name = "torch"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    def add_rms_norm(self, x: Tensor, residual: Tensor, *, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(residual.add_(x), weight, eps)

    def rope_and_store(
        self,
        qkv: Tensor,
        batch: BatchLayout,
        *,
        kv: KvView,
        layer: int,
        cos: Tensor,
        sin: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        kv_heads = kv.layout.num_kv_heads
        heads = qkv.view(len(qkv), -1, kv.layout.head_dim)
        q, k, v = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
        positions = batch.positions.long()
        cos, sin = cos[positions, None], sin[positions, None]
        q = _rotate(q if q_norm is None else self.rms_norm(q, q_norm, eps), cos, sin)
        k = _rotate(k if k_norm is None else self.rms_norm(k, k_norm, eps), cos, sin)
        _store(k, v, batch, kv=kv, layer=layer)
        return q

    def attention(
        self, q: Tensor, batch: BatchLayout, *, kv: KvView, layer: int, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        out = torch.empty_like(q)
        tables = torch.split(batch.block_table.long(), list(batch.table_lens))
        start = 0
        for query_len, context_len, table in zip(batch.query_lens, batch.context_lens, tables, strict=True):
            seen_from = 0 if sliding_window is None else max(0, context_len - query_len - sliding_window + 1)
            first_block = seen_from // kv.layout.block_tokens
            k, v = _gather(kv, layer, slots=table[first_block : kv.layout.blocks_of(context_len)])
            num_keys = context_len - first_block * kv.layout.block_tokens
            visible = _visible(query_len, num_keys, window=sliding_window, device=q.device)
            rows = q[start : start + query_len].transpose(0, 1)
            mixed = F.scaled_dot_product_attention(
                rows[None], k[None, :, :num_keys], v[None, :, :num_keys], attn_mask=visible, scale=scale, enable_gqa=True
            )
            out[start : start + query_len] = mixed[0].transpose(0, 1)
            start += query_len
        return out.flatten(1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def linear(self, x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, PackedWeight):
            raise TypeError("linear: expected a plain weight, got one packed by other Ops")
        return F.linear(x, weight, bias)

    def pack_weight(self, weight: Tensor) -> Tensor | PackedWeight:
        return weight

    def copy_tokens(self, source: KvView, target: KvView, *, layer: int, tokens: TokenCopies) -> None:
        copy_tokens(source, target, layer=layer, tokens=tokens)


def copy_tokens(source: KvView, target: KvView, *, layer: int, tokens: TokenCopies) -> None:
    """`Ops.copy_tokens`, each token alone."""
    pages, slots, offsets = tokens.sources, tokens.targets, tokens.offsets
    target.keys(layer)[slots, :, :, offsets] = source.keys(layer)[pages, :, :, offsets]
    held, stored = source.values(layer), target.values(layer)
    if source.layout.is_packed:
        stored[slots, :, offsets // 2, :, offsets % 2] = held[pages, :, offsets // 2, :, offsets % 2]
        return
    stored[slots, :, offsets] = held[pages, :, offsets]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, head_dim] in float32, rounded once; cos and sin are [T, 1, rotary_dim / 2]."""
    half = cos.shape[-1]
    wide = x.float()
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x.dtype)


def _store(k: Tensor, v: Tensor, batch: BatchLayout, *, kv: KvView, layer: int) -> None:
    slots, offsets = batch.slot_of_token.long(), batch.offset_of_token.long()
    if not kv.layout.is_packed:
        kv.keys(layer)[slots, :, :, offsets] = k
        kv.values(layer)[slots, :, offsets] = v
        return
    kv.keys(layer)[slots, :, :, offsets] = torch.unflatten(k, 2, (-1, 2))
    kv.values(layer)[slots, :, offsets // 2, :, offsets % 2] = v


def _gather(kv: KvView, layer: int, *, slots: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of these blocks, token by token: [kv_heads, blocks * block_tokens, head_dim] each."""
    k, v = kv.keys(layer)[slots], kv.values(layer)[slots]
    if kv.layout.is_packed:
        k = k.permute(1, 0, 3, 2, 4).flatten(3)  # [kv_heads, blocks, block_tokens, head_dim]
        v = v.permute(1, 0, 2, 4, 3).flatten(2, 3)
    else:
        k, v = k.permute(1, 0, 3, 2), v.transpose(0, 1)
    return k.flatten(1, 2), v.flatten(1, 2)


def _visible(query_len: int, num_keys: int, *, window: int | None, device: torch.device) -> Tensor:
    """Which of the last `num_keys` keys each of the last `query_len` tokens sees, bool [query_len, num_keys]."""
    key = torch.arange(num_keys, device=device)
    query = torch.arange(num_keys - query_len, num_keys, device=device)[:, None]
    visible = key <= query
    return visible if window is None else visible & (key > query - window)
