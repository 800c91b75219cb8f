"""What a layer does to each token by itself, in Triton: norms, the gate, the rotation and the way into the pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvasir.engine.torch.kernels.batch import BatchLayout
from kvasir.engine.torch.kernels.layout import KvView
from kvasir.engine.torch.kernels.ops import TokenCopies

WIDTH = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None) -> Tensor:
    """`Ops.rms_norm`; with a residual [T, H], which takes x, `Ops.add_rms_norm`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    total = x if residual is None else residual
    _rms_norm[x.numel() // width,](
        x, total, weight, out, width, eps, IS_ADDED=residual is not None, WIDTH=triton.next_power_of_2(width)
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """`Ops.silu_mul`."""
    num_tokens, both = gate_up.shape
    out = torch.empty(num_tokens, both // 2, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[num_tokens, triton.cdiv(both // 2, WIDTH)](gate_up, out, both // 2, WIDTH=WIDTH)
    return out


def rope_and_store(
    qkv: Tensor,
    batch: BatchLayout,
    *,
    kv: KvView,
    layer: int,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """`Ops.rope_and_store`."""
    layout = kv.layout
    width = qkv.shape[1] // layout.head_dim
    heads = width - 2 * layout.num_kv_heads
    q = torch.empty(len(qkv), heads, layout.head_dim, dtype=qkv.dtype, device=qkv.device)
    _rope_and_store[len(qkv), width](
        qkv,
        q,
        kv.base.view(layout.dtype),
        batch.positions,
        batch.slot_of_token,
        batch.offset_of_token,
        cos,
        sin,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        eps,
        kv.slot_stride // layout.dtype.itemsize,
        layer * layout.layer_elements,
        HEADS=heads,
        KV_HEADS=layout.num_kv_heads,
        HEAD_DIM=layout.head_dim,
        HALF=cos.shape[-1],
        PADDED=triton.next_power_of_2(layout.head_dim),
        BLOCK=layout.block_tokens,
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        IS_PACKED=layout.is_packed,
        num_warps=1,
    )
    return q


def copy_tokens(source: KvView, target: KvView, *, layer: int, tokens: TokenCopies) -> None:
    """`Ops.copy_tokens`, in words of four bytes: over a bus each write costs as much as a longer one."""
    layout = source.layout
    words = 4 // layout.dtype.itemsize
    _copy_tokens[len(tokens), layout.num_kv_heads](
        source.base.view(torch.int32),
        target.base.view(torch.int32),
        tokens.sources,
        tokens.targets,
        tokens.offsets,
        source.slot_stride // 4,
        target.slot_stride // 4,
        layer * layout.layer_bytes // 4,
        layout.num_kv_heads * layout.head_elements // words,
        ROWS=layout.head_dim // words,
        PADDED=triton.next_power_of_2(layout.head_dim),
        HEAD_DIM=layout.head_dim,
        BLOCK=layout.block_tokens,
        WORDS=words,
        num_warps=1,
    )


@triton.jit
def _copy_tokens(
    source_ptr,
    target_ptr,
    sources,
    targets,
    offsets,
    source_words,
    target_words,
    layer_start,
    value_start,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    offset = tl.load(offsets + token)
    start = layer_start + head * (ROWS * BLOCK)
    source = source_ptr + tl.load(sources + token) * source_words + start
    target = target_ptr + tl.load(targets + token) * target_words + start
    row = tl.arange(0, PADDED)
    k_at, v_at = row * BLOCK + offset, value_start + offset // WORDS * HEAD_DIM + row
    tl.store(target + k_at, tl.load(source + k_at, mask=row < ROWS), mask=row < ROWS)
    tl.store(target + v_at, tl.load(source + v_at, mask=row < HEAD_DIM), mask=row < HEAD_DIM)


@triton.jit
def _rms_norm(x_ptr, total_ptr, weight_ptr, out_ptr, width, eps, IS_ADDED: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    is_column = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    x = tl.load(x_ptr + at, mask=is_column, other=0.0)
    if IS_ADDED:
        x = (x.to(tl.float32) + tl.load(total_ptr + at, mask=is_column, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + at, x, mask=is_column)
    tl.store(out_ptr + at, _normed(x, weight_ptr, column, is_column, eps, width), mask=is_column)


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, width, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_column = column < width
    gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=is_column, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * width + width + column, mask=is_column, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + row * width + column, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=is_column)


@triton.jit
def _normed(x, norm_ptr, dim, is_dim, eps, width):
    wide = x.to(tl.float32)
    normed = (wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps))).to(x.dtype)
    weight = tl.load(norm_ptr + dim, mask=is_dim, other=0.0)
    return (normed.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def _rope_and_store(
    qkv_ptr,
    q_ptr,
    kv_ptr,
    positions,
    slot_of_token,
    offset_of_token,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    slot_elements,
    layer_start,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    IS_PACKED: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, PADDED)
    is_dim = dim < HEAD_DIM
    partner = tl.where(dim < HALF, dim + HALF, tl.where(dim < 2 * HALF, dim - HALF, dim))
    row = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM
    x, y = tl.load(row + dim, mask=is_dim, other=0.0), tl.load(row + partner, mask=is_dim, other=0.0)
    slot, offset = tl.load(slot_of_token + token).to(tl.int64), tl.load(offset_of_token + token)
    base = kv_ptr + slot * slot_elements + layer_start

    if head >= HEADS + KV_HEADS:
        at = (KV_HEADS + head - HEADS - KV_HEADS) * (HEAD_DIM * BLOCK)
        if IS_PACKED:
            tl.store(base + at + (offset // 2) * (2 * HEAD_DIM) + dim * 2 + offset % 2, x, mask=is_dim)
        else:
            tl.store(base + at + offset * HEAD_DIM + dim, x, mask=is_dim)
        return

    if head < HEADS:
        if HAS_Q_NORM:
            x, y = (
                _normed(x, q_norm_ptr, dim, is_dim, eps, HEAD_DIM),
                _normed(y, q_norm_ptr, partner, is_dim, eps, HEAD_DIM),
            )
    else:
        if HAS_K_NORM:
            x, y = (
                _normed(x, k_norm_ptr, dim, is_dim, eps, HEAD_DIM),
                _normed(y, k_norm_ptr, partner, is_dim, eps, HEAD_DIM),
            )

    is_turned = dim < 2 * HALF
    angle = tl.load(positions + token).to(tl.int64) * HALF + dim % HALF
    cos = tl.load(cos_ptr + angle, mask=is_turned, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=is_turned, other=0.0)
    turned = x.to(tl.float32) * cos + tl.where(dim < HALF, -y.to(tl.float32), y.to(tl.float32)) * sin
    turned = turned.to(x.dtype)
    if head < HEADS:
        tl.store(q_ptr + (token * HEADS + head) * HEAD_DIM + dim, turned, mask=is_dim)
    else:
        at = (head - HEADS) * (HEAD_DIM * BLOCK)
        if IS_PACKED:
            tl.store(base + at + (dim // 2) * (2 * BLOCK) + offset * 2 + dim % 2, turned, mask=is_dim)
        else:
            tl.store(base + at + dim * BLOCK + offset, turned, mask=is_dim)
