"""Attention over the pages of a GPU, in Triton: whole prompts, chunks and single tokens in one launch.

A program takes up to ROWS (new token, head) pairs of one key head and one sequence, and walks over the keys that they see.
A sequence with few such rows, as in a decode step, is cut along its keys into parts of SPLIT_KEYS: each part leaves its sum,
its largest score and its weight, and a second kernel puts them together (flash decoding). How a sequence is cut depends on
nothing but itself, so a token does not change with what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvasir.engine.torch.kernels.batch import BatchLayout
from kvasir.engine.torch.kernels.layout import KvView

ROWS = 128
FEW_ROWS = 16
SPLIT_KEYS = 1024
PROGRAMS = 512
"""A sequence is cut into no more parts than give so many programs: two for each of a large GPU's processors, and some."""

KEYS_AT_ONCE = 64
KEYS_AT_ONCE_FLOAT32 = 32
WARPS = 4
STAGES = 2
LOG2_E = 1.4426950408889634
"""Scores are scaled by it, since powers of two are what the hardware has."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Which program computes what; the same for all layers of a step.

    tiles [B, 4]: sequence, first new token in it, first program, number of programs; programs [P, 4]: tile, part of its keys.
    """

    tiles: Tensor
    programs: Tensor
    rows: int

    @classmethod
    def of(cls, batch: BatchLayout, *, heads: int, kv_heads: int) -> AttentionPlan:
        group = heads // kv_heads
        rows = FEW_ROWS if max(batch.query_lens) * group <= FEW_ROWS else ROWS
        tokens = max(1, rows // group)
        tiles: list[tuple[int, int, int, int]] = []
        programs: list[tuple[int, int, int, int]] = []
        for sequence, (new, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            parts = _parts_of(new * group, context, kv_heads)
            for first in range(0, new, tokens):
                programs += [(len(tiles), part, 0, 0) for part in range(parts)]
                tiles.append((sequence, first, len(programs) - parts, parts))
        both = torch.from_numpy(np.array([*tiles, *programs], dtype=np.int32)).to(batch.ints.device)
        return cls(both[: len(tiles)], both[len(tiles) :], max(rows, triton.next_power_of_2(group)))


def _parts_of(rows: int, context: int, kv_heads: int) -> int:
    """Into how many parts the keys of a sequence with so many rows are cut."""
    tiles = -(-rows // (FEW_ROWS if rows <= FEW_ROWS else ROWS))
    return max(1, min(-(-context // SPLIT_KEYS), PROGRAMS // (tiles * kv_heads)))


def paged_attention(
    q: Tensor,
    batch: BatchLayout,
    plan: AttentionPlan,
    *,
    kv: KvView,
    layer: int,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """`Ops.attention`."""
    layout = kv.layout
    num_tokens, heads, head_dim = q.shape
    group, padded = heads // layout.num_kv_heads, triton.next_power_of_2(head_dim)
    num_programs = len(plan.programs)
    sums = torch.empty(num_programs, layout.num_kv_heads, plan.rows, padded, dtype=torch.float32, device=q.device)
    marks = torch.empty(2, num_programs, layout.num_kv_heads, plan.rows, dtype=torch.float32, device=q.device)
    out = torch.empty(num_tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    elements = kv.base.view(layout.dtype)
    _parts[num_programs, layout.num_kv_heads](
        q.contiguous(),
        elements,
        plan.tiles,
        plan.programs,
        batch.query_start,
        batch.table_start,
        batch.context_len,
        batch.block_table,
        sums,
        marks,
        scale * LOG2_E,
        sliding_window or 0,
        kv.slot_stride // layout.dtype.itemsize,
        layer * layout.layer_elements,
        num_programs,
        GROUP=group,
        KV_HEADS=layout.num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED=padded,
        PAIRS=max(16, padded // 2),
        BLOCK=layout.block_tokens,
        ROWS=plan.rows,
        KEYS=KEYS_AT_ONCE if layout.is_packed else KEYS_AT_ONCE_FLOAT32,
        IS_PACKED=layout.is_packed,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    _whole[len(plan.tiles), layout.num_kv_heads](
        out,
        plan.tiles,
        batch.query_start,
        sums,
        marks,
        num_programs,
        GROUP=group,
        KV_HEADS=layout.num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED=padded,
        ROWS=plan.rows,
        num_warps=4,
    )
    return out.flatten(1)


@triton.jit
def _parts(
    q_ptr,
    kv_ptr,
    tiles,
    programs,
    query_start,
    table_start,
    context_len,
    block_table,
    sums,
    marks,
    scale_log2,
    window,
    slot_elements,
    layer_start,
    num_programs,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    IS_PACKED: tl.constexpr,
):
    program, head = tl.program_id(0), tl.program_id(1)
    tile, part = tl.load(programs + 4 * program), tl.load(programs + 4 * program + 1)
    sequence, first = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1)
    num_parts = tl.load(tiles + 4 * tile + 3)
    row_start = tl.load(query_start + sequence)
    new = tl.load(query_start + sequence + 1) - row_start
    context = tl.load(context_len + sequence)
    table = block_table + tl.load(table_start + sequence)

    row = tl.arange(0, ROWS)
    token = first + row // GROUP
    is_row = (token < new) & (row < (ROWS // GROUP) * GROUP)
    position = context - new + token
    dim = tl.arange(0, PADDED)
    is_dim = dim < HEAD_DIM
    q_row = q_ptr + ((row_start + token) * (KV_HEADS * GROUP) + head * GROUP + row % GROUP)[:, None] * HEAD_DIM

    last_token = tl.minimum(first + ROWS // GROUP, new) - 1
    seen_to = context - new + last_token + 1
    seen_from = 0
    if window > 0:
        seen_from = tl.maximum(0, context - new + first - window + 1) // KEYS * KEYS
    per_part = tl.cdiv(tl.cdiv(seen_to - seen_from, KEYS), num_parts) * KEYS
    key_from = seen_from + part * per_part
    key_to = tl.minimum(seen_to, key_from + per_part)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    head_start = layer_start + head * (HEAD_DIM * BLOCK)
    value_start = KV_HEADS * HEAD_DIM * BLOCK
    if IS_PACKED:
        # Keys and dimensions lie in pairs. Even and odd ones are taken apart as they are loaded, and never put together:
        # a score is a sum over even and odd dimensions, an output a sum over even and odd keys.
        pair = tl.arange(0, PAIRS)
        is_pair = pair < HEAD_DIM // 2
        q_even = tl.load(q_row + 2 * pair[None, :], mask=is_row[:, None] & is_pair[None, :], other=0.0)
        q_odd = tl.load(q_row + 2 * pair[None, :] + 1, mask=is_row[:, None] & is_pair[None, :], other=0.0)
        element = q_even.dtype
        for start in range(key_from, key_to, KEYS):
            even = start + 2 * tl.arange(0, KEYS // 2)
            is_key, is_odd = even < key_to, even + 1 < key_to
            slot = tl.load(table + even // BLOCK, mask=is_key, other=0).to(tl.int64)
            base = slot * slot_elements + head_start
            two_keys = (even % BLOCK) // 2
            k_at = (kv_ptr + base).to(tl.pointer_type(tl.int64))[None, :] + pair[:, None] * (BLOCK // 2) + two_keys[None, :]
            k = tl.load(k_at, mask=is_pair[:, None] & is_key[None, :], other=0)
            score_even = tl.dot(q_even, k.to(tl.int16).to(element, bitcast=True))
            score_even = tl.dot(q_odd, (k >> 16).to(tl.int16).to(element, bitcast=True), score_even)
            score_odd = tl.dot(q_even, (k >> 32).to(tl.int16).to(element, bitcast=True))
            score_odd = tl.dot(q_odd, (k >> 48).to(tl.int16).to(element, bitcast=True), score_odd)
            score_even = _masked(score_even * scale_log2, even, is_key, position, window)
            score_odd = _masked(score_odd * scale_log2, even + 1, is_odd, position, window)
            higher = tl.maximum(best, tl.maximum(tl.max(score_even, 1), tl.max(score_odd, 1)))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(best - safe)
            p_even, p_odd = tl.exp2(score_even - safe[:, None]), tl.exp2(score_odd - safe[:, None])
            weight = weight * shrink + tl.sum(p_even, 1) + tl.sum(p_odd, 1)
            best = higher
            v_row = (kv_ptr + base + value_start).to(tl.pointer_type(tl.int32))
            v_at = v_row[:, None] + two_keys[:, None] * HEAD_DIM + dim[None, :]
            v = tl.load(v_at, mask=is_key[:, None] & is_dim[None, :], other=0)
            v_odd = tl.where(is_odd[:, None], v >> 16, 0)  # the key after the last may be anything, and 0 times NaN is NaN
            acc = tl.dot(p_even.to(element), v.to(tl.int16).to(element, bitcast=True), acc * shrink[:, None])
            acc = tl.dot(p_odd.to(element), v_odd.to(tl.int16).to(element, bitcast=True), acc)
    else:
        q = tl.load(q_row + dim[None, :], mask=is_row[:, None] & is_dim[None, :], other=0.0)
        for start in range(key_from, key_to, KEYS):
            key = start + tl.arange(0, KEYS)
            is_key = key < key_to
            slot = tl.load(table + key // BLOCK, mask=is_key, other=0).to(tl.int64)
            base = slot * slot_elements + head_start
            k_at = base[None, :] + (dim * BLOCK)[:, None] + (key % BLOCK)[None, :]
            k = tl.load(kv_ptr + k_at, mask=is_dim[:, None] & is_key[None, :], other=0.0)
            score = tl.dot(q, k, input_precision="ieee") * scale_log2
            score = _masked(score, key, is_key, position, window)
            higher = tl.maximum(best, tl.max(score, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(best - safe)
            p = tl.exp2(score - safe[:, None])
            weight = weight * shrink + tl.sum(p, 1)
            best = higher
            v_at = (base + value_start + (key % BLOCK) * HEAD_DIM)[:, None] + dim[None, :]
            v = tl.load(kv_ptr + v_at, mask=is_key[:, None] & is_dim[None, :], other=0.0)
            acc = acc * shrink[:, None] + tl.dot(p, v, input_precision="ieee")

    at = (program * KV_HEADS + head) * ROWS + row
    tl.store(sums + at.to(tl.int64)[:, None] * PADDED + dim[None, :], acc)
    tl.store(marks + at, best)
    tl.store(marks + num_programs * KV_HEADS * ROWS + at, weight)


@triton.jit
def _masked(score, key, is_key, position, window):
    visible = (key[None, :] <= position[:, None]) & is_key[None, :]
    if window > 0:
        visible = visible & (key[None, :] > position[:, None] - window)
    return tl.where(visible, score, float("-inf"))


@triton.jit
def _whole(
    out_ptr,
    tiles,
    query_start,
    sums,
    marks,
    num_programs,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    sequence, first = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1)
    program, num_parts = tl.load(tiles + 4 * tile + 2), tl.load(tiles + 4 * tile + 3)
    row_start = tl.load(query_start + sequence)
    new = tl.load(query_start + sequence + 1) - row_start
    row, dim = tl.arange(0, ROWS), tl.arange(0, PADDED)
    token = first + row // GROUP
    is_row = (token < new) & (row < (ROWS // GROUP) * GROUP)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    for part in range(num_parts):
        at = ((program + part) * KV_HEADS + head) * ROWS + row
        other = tl.load(marks + at)
        higher = tl.maximum(best, other)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, grow = tl.exp2(best - safe), tl.exp2(other - safe)
        weight = weight * shrink + tl.load(marks + num_programs * KV_HEADS * ROWS + at) * grow
        acc = acc * shrink[:, None] + tl.load(sums + at.to(tl.int64)[:, None] * PADDED + dim[None, :]) * grow[:, None]
        best = higher
    at = ((row_start + token) * (KV_HEADS * GROUP) + head * GROUP + row % GROUP)[:, None] * HEAD_DIM + dim[None, :]
    value = acc / tl.where(weight == 0.0, 1.0, weight)[:, None]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & (dim < HEAD_DIM)[None, :])
