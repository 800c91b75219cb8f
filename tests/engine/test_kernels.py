"""One contract over all implementations of the operations, against naive float32 torch.

The Triton kernels run where there is a GPU; with TRITON_INTERPRET=1 and Triton installed, slowly, on a CPU too.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvasir.engine.torch.kernels import BatchLayout, KvLayout, KvView, Ops, PackedWeight, TokenCopies, TorchOps, load_ops
from kvasir.engine.torch.kernels.cpp_ops import Arithmetic, CppOps
from kvasir.engine.torch.kernels.load import PACKAGE
from kvasir.native.cpp import build

BF16, F32 = torch.bfloat16, torch.float32
DTYPES = [pytest.param(F32, id="float32"), pytest.param(BF16, id="bf16")]
EPS = 1e-6


def _implementations() -> dict[str, tuple[Ops, str]]:
    """By name: the operations, and the device that they are tested on."""
    found: dict[str, tuple[Ops, str]] = {"torch": (TorchOps("the fallback under test"), "cpu")}
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    best, on_gpu = load_ops("cpu"), load_ops("cuda")
    if best.name == "cpp":
        library = build(PACKAGE)
        found["cpp"] = CppOps(library, arithmetic=Arithmetic.DOT), "cpu"
        found["cpp, widening"] = CppOps(library, arithmetic=Arithmetic.FLOAT32), "cpu"
        if CDLL(str(library)).kvasir_has_amx():
            found["cpp, AMX"] = CppOps(library, arithmetic=Arithmetic.AMX), "cpu"
    if on_gpu.name == "triton" and (gpu == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        found["triton"] = on_gpu, gpu
    return found


IMPLEMENTATIONS = _implementations()


@pytest.fixture(params=IMPLEMENTATIONS)
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    """With its device as torch's default, so that a test makes its tensors there."""
    chosen, device = IMPLEMENTATIONS[request.param]
    with torch.device(device):
        torch.manual_seed(7)
        yield chosen


@dataclass(frozen=True, slots=True)
class Model:
    """The shape of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype
    layers: int = 2

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def layout(self) -> KvLayout:
        return KvLayout(self.layers, self.kv_heads, self.head_dim, self.block_tokens, self.dtype)

    def rotary(self, *, rotary_dim: int | None = None, max_position: int = 1024) -> tuple[Tensor, Tensor]:
        rotary_dim = rotary_dim or self.head_dim
        frequency = 10_000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
        angle = torch.arange(max_position)[:, None] * frequency
        return angle.cos(), angle.sin()


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence: `cached` are in the arena before the step."""

    cached: int
    new: int


class Sequences:
    """Sequences with random q, k, v, in scattered slots of an arena full of NaN."""

    def __init__(self, model: Model, chunks: Sequence[Chunk]) -> None:
        self.model, self.chunks = model, list(chunks)
        layout = model.layout()
        blocks = [layout.blocks_of(c.cached + c.new) for c in self.chunks]
        order = torch.randperm(sum(blocks) + 3).tolist()
        self.tables = [[order.pop() for _ in range(n)] for n in blocks]
        stride = layout.slot_bytes + 64
        self.kv = KvView(torch.full(((sum(blocks) + 3) * stride,), 255, dtype=torch.uint8), layout, stride)
        width = model.heads + 2 * model.kv_heads
        self.qkv = [torch.randn(c.cached + c.new, width, model.head_dim).to(model.dtype) for c in self.chunks]

    def batch(self, chunks: Sequence[Chunk] | None = None) -> BatchLayout:
        chunks = chunks or self.chunks
        return BatchLayout.build(
            [c.new for c in chunks],
            [c.cached + c.new for c in chunks],
            block_tables=self.tables,
            block_tokens=self.model.block_tokens,
            device=self.kv.base.device,
        )

    def rows(self, chunks: Sequence[Chunk]) -> Tensor:
        """qkv of the chunks' new tokens, [T, width]."""
        parts = [qkv[c.cached : c.cached + c.new] for qkv, c in zip(self.qkv, chunks, strict=True)]
        return torch.cat(parts).flatten(1).contiguous()

    def step(self, ops: Ops, chunks: Sequence[Chunk], *, layer: int = 1, window: int | None = None) -> Tensor:
        """Store and attend without rotation."""
        batch, model = self.batch(chunks), self.model
        cos, sin = torch.ones(8192, model.head_dim // 2), torch.zeros(8192, model.head_dim // 2)
        q = ops.rope_and_store(self.rows(chunks), batch, kv=self.kv, layer=layer, cos=cos, sin=sin)
        return ops.attention(q, batch, kv=self.kv, layer=layer, scale=model.scale, sliding_window=window)

    def prime(self, ops: Ops) -> None:
        """Store the cached tokens."""
        for qkv, table, chunk in zip(self.qkv, self.tables, self.chunks, strict=True):
            if not chunk.cached:
                continue
            batch = BatchLayout.build(
                [chunk.cached],
                [chunk.cached],
                block_tables=[table],
                block_tokens=self.model.block_tokens,
                device=self.kv.base.device,
            )
            half = self.model.head_dim // 2
            cos, sin = torch.ones(8192, half), torch.zeros(8192, half)
            rows = qkv[: chunk.cached].flatten(1).contiguous()
            ops.rope_and_store(rows, batch, kv=self.kv, layer=1, cos=cos, sin=sin)

    def expected(self, *, window: int | None = None) -> Tensor:
        """Naive attention of the new tokens in float64."""
        parts = []
        heads, kv_heads = self.model.heads, self.model.kv_heads
        for qkv, chunk in zip(self.qkv, self.chunks, strict=True):
            q, k, v = torch.split(qkv.double(), [heads, kv_heads, kv_heads], dim=1)
            k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
            score = torch.einsum("qhd,khd->hqk", q[chunk.cached :], k) * self.model.scale
            distance = torch.arange(chunk.cached, len(q))[:, None] - torch.arange(len(q))
            hidden = (distance < 0) | (distance >= (window or len(q)))
            seen = score.masked_fill(hidden, float("-inf")).softmax(-1)
            parts.append(torch.einsum("hqk,khd->qhd", seen, v))
        return torch.cat(parts).flatten(1)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within a relative error of the largest magnitude: 1e-5 for float32, two roundings for bf16."""
    assert got.dtype == dtype
    bound = (1e-5 if dtype == F32 else 1.6e-2) * expected.abs().max().item()
    assert (got.double() - expected.double()).abs().max().item() <= bound


# Norms and activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 512), (3, 896), (70, 37), (65, 64)])
def test_rms_norm_is_llamas(ops: Ops, dtype: torch.dtype, tokens: int, width: int) -> None:
    x, weight = (3 * torch.randn(tokens, width)).to(dtype), torch.randn(width).to(dtype)
    wide = x.double()
    expected = (wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()).to(dtype) * weight
    assert_close(ops.rms_norm(x, weight, EPS), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_writes_the_residual_in_place(ops: Ops, dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(9, 96).to(dtype), torch.randn(9, 96).to(dtype), torch.randn(96).to(dtype)
    total = x + residual
    normed = ops.add_rms_norm(x, residual, weight=weight, eps=EPS)
    assert torch.equal(residual, total)
    assert_close(normed, TorchOps("reference").rms_norm(total, weight, EPS), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1376), (33, 50), (128, 4864)])
def test_silu_mul_takes_the_gate_first(ops: Ops, dtype: torch.dtype, tokens: int, width: int) -> None:
    gate_up = (4 * torch.randn(tokens, 2 * width)).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(ops.silu_mul(gate_up), F.silu(gate) * up, dtype)


def test_silu_mul_of_extreme_gates_is_finite(ops: Ops) -> None:
    gate_up = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, 1.0] + [1.0] * 8])
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert torch.allclose(ops.silu_mul(gate_up).double(), F.silu(gate) * up, rtol=1e-5, atol=1e-30)


# Rotation and the arena


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (32, 32), (128, 128), (96, 48), (64, 16)])
def test_rope_and_store_is_rotate_half(ops: Ops, dtype: torch.dtype, qk_norm: bool, head_dim: int, rotary_dim: int) -> None:
    model = Model(heads=4, kv_heads=2, head_dim=head_dim, block_tokens=16, dtype=dtype)
    chunks = [Chunk(0, 37), Chunk(20, 1), Chunk(5, 18)]
    seqs = Sequences(model, chunks)
    batch, qkv = seqs.batch(), seqs.rows(chunks)
    cos, sin = model.rotary(rotary_dim=rotary_dim)
    norms = [torch.randn(head_dim).to(dtype) if qk_norm else None for _ in range(2)]
    q = ops.rope_and_store(qkv, batch, kv=seqs.kv, layer=1, cos=cos, sin=sin, q_norm=norms[0], k_norm=norms[1], eps=EPS)
    raw_q, raw_k, raw_v = torch.split(qkv.view(len(qkv), -1, head_dim), [4, 2, 2], dim=1)
    assert_close(q, _rotated(raw_q, batch.positions, cos=cos, sin=sin, norm=norms[0]), dtype)
    k, v = _stored(seqs.kv, batch, layer=1)
    assert_close(k, _rotated(raw_k, batch.positions, cos=cos, sin=sin, norm=norms[1]), dtype)
    assert torch.equal(v, raw_v)


def test_rope_and_store_writes_nothing_else(ops: Ops) -> None:
    model = Model(heads=2, kv_heads=1, head_dim=32, block_tokens=16, dtype=BF16)
    seqs = Sequences(model, [Chunk(3, 2)])
    seqs.step(ops, seqs.chunks, layer=0)
    assert (seqs.kv.base != 255).sum() <= 2 * 2 * 32 * 2


def _rotated(x: Tensor, positions: Tensor, *, cos: Tensor, sin: Tensor, norm: Tensor | None) -> Tensor:
    if norm is not None:
        x = TorchOps("reference").rms_norm(x, norm, EPS)
    rotary_dim = 2 * cos.shape[1]
    turning, rest = torch.split(x.double(), [rotary_dim, x.shape[-1] - rotary_dim], dim=-1)
    half = torch.cat((-turning[..., rotary_dim // 2 :], turning[..., : rotary_dim // 2]), dim=-1)
    wide_cos, wide_sin = (torch.cat((t, t), dim=-1)[positions.long(), None] for t in (cos, sin))
    return torch.cat((turning * wide_cos + half * wide_sin, rest), dim=-1)


def _stored(kv: KvView, batch: BatchLayout, *, layer: int) -> tuple[Tensor, Tensor]:
    """K and V of the batch's new tokens as the layout's docstring draws them, one element at a time."""
    lay = kv.layout
    k, v = (torch.empty(batch.num_tokens, lay.num_kv_heads, lay.head_dim, dtype=lay.dtype) for _ in range(2))
    places = zip(batch.slot_of_token.tolist(), batch.offset_of_token.tolist(), strict=True)
    for token, (slot, offset) in enumerate(places):
        heads = kv.layer_of_slot(slot, layer).view(lay.dtype).view(2, lay.num_kv_heads, -1)
        d = torch.arange(lay.head_dim)
        if lay.is_packed:
            k[token] = heads[0][:, (d // 2) * lay.block_tokens * 2 + offset * 2 + d % 2]
            v[token] = heads[1][:, (offset // 2) * lay.head_dim * 2 + d * 2 + offset % 2]
        else:
            k[token], v[token] = heads[0][:, d * lay.block_tokens + offset], heads[1][:, offset * lay.head_dim + d]
    return k, v


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_tokens_are_copied_to_other_slots(ops: Ops, dtype: torch.dtype) -> None:
    """The other token of a pair may go along; all others stay."""
    layout = KvLayout(num_layers=2, num_kv_heads=3, head_dim=48, block_tokens=16, dtype=dtype)
    source, target = KvView.empty(6, layout, torch.get_default_device()), KvView.empty(9, layout, torch.get_default_device())
    source.base.view(dtype).copy_(torch.randn(source.base.numel() // dtype.itemsize))
    pages, slots, offsets = (torch.tensor(values) for values in ([5, 0, 3], [8, 2, 4], [7, 4, 15]))
    ops.copy_tokens(source, target, layer=1, tokens=TokenCopies(pages, slots, offsets))
    for page, slot, offset in zip(pages.tolist(), slots.tolist(), offsets.tolist(), strict=True):
        for held, stored in zip(_tokens(source, page, layer=1), _tokens(target, slot, layer=1), strict=True):
            assert torch.equal(held[:, offset], stored[:, offset])
            others = [token for token in range(16) if token not in (offset, offset ^ 1)]
            assert not stored[:, others].any()
    assert not target.keys(0).any()
    assert not target.values(0).any()


def _tokens(kv: KvView, slot: int, *, layer: int) -> tuple[Tensor, Tensor]:
    """K and V of one block, [kv_heads, block_tokens, head_dim] each."""
    lay = kv.layout
    k, v = kv.keys(layer)[slot], kv.values(layer)[slot]
    if lay.is_packed:
        return k.permute(0, 2, 1, 3).flatten(2), v.permute(0, 1, 3, 2).flatten(1, 2)
    return k.transpose(1, 2), v


# Attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_tokens", [16, 64, 128])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_attention_of_a_mixed_batch(ops: Ops, dtype: torch.dtype, block_tokens: int, head_dim: int) -> None:
    model = Model(heads=4, kv_heads=2, head_dim=head_dim, block_tokens=block_tokens, dtype=dtype)
    seqs = Sequences(model, [Chunk(0, 1), Chunk(300, 1), Chunk(77, 50), Chunk(0, 131), Chunk(63, 1), Chunk(64, 64)])
    seqs.prime(ops)
    assert_close(seqs.step(ops, seqs.chunks), seqs.expected(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (8, 2), (14, 2), (8, 1)])
def test_attention_groups_heads(ops: Ops, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    model = Model(heads=heads, kv_heads=kv_heads, head_dim=64, block_tokens=64, dtype=dtype)
    seqs = Sequences(model, [Chunk(130, 1), Chunk(10, 90)])
    seqs.prime(ops)
    assert_close(seqs.step(ops, seqs.chunks), seqs.expected(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 7, 64, 1000])
@pytest.mark.parametrize("block_tokens", [16, 64])
def test_attention_with_a_sliding_window(ops: Ops, dtype: torch.dtype, window: int, block_tokens: int) -> None:
    model = Model(heads=4, kv_heads=2, head_dim=64, block_tokens=block_tokens, dtype=dtype)
    seqs = Sequences(model, [Chunk(200, 1), Chunk(150, 70), Chunk(0, 40)])
    seqs.prime(ops)
    assert_close(seqs.step(ops, seqs.chunks, window=window), seqs.expected(window=window), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_one_token_over_a_long_context(ops: Ops, dtype: torch.dtype) -> None:
    model = Model(heads=4, kv_heads=2, head_dim=32, block_tokens=64, dtype=dtype)
    seqs = Sequences(model, [Chunk(5_001, 1), Chunk(4_998, 3)])
    seqs.prime(ops)
    assert_close(seqs.step(ops, seqs.chunks), seqs.expected(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_tokens", [16, 64])
def test_a_result_does_not_depend_on_the_cut_into_chunks(ops: Ops, dtype: torch.dtype, block_tokens: int) -> None:
    model = Model(heads=4, kv_heads=2, head_dim=64, block_tokens=block_tokens, dtype=dtype)
    whole = Sequences(model, [Chunk(0, 211)])
    at_once = whole.step(ops, whole.chunks)
    cuts = [0, 1, 2, 50, 113, 200, 210, 211]
    pieces = [whole.step(ops, [Chunk(a, b - a)]) for a, b in pairwise(cuts)]
    assert_close(torch.cat(pieces), at_once, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_does_not_depend_on_the_thread_count(ops: Ops, dtype: torch.dtype) -> None:
    model = Model(heads=4, kv_heads=2, head_dim=64, block_tokens=64, dtype=dtype)
    seqs = Sequences(model, [Chunk(0, 100), Chunk(3000, 1), Chunk(20, 30)])
    seqs.prime(ops)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(seqs.step(ops, seqs.chunks))
    finally:
        torch.set_num_threads(threads)
    assert_close(results[1], results[0], dtype)


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.builds(Chunk, st.integers(0, 150), st.integers(1, 90)), min_size=1, max_size=5),
    grouping=st.sampled_from([(1, 1), (4, 1), (4, 2), (7, 1), (6, 3)]),
    head_dim=st.sampled_from([16, 32, 48, 64]),
    block_tokens=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from([F32, BF16]),
    window=st.sampled_from([None, None, 5, 70]),
)
def test_attention_of_any_batch(
    chunks: list[Chunk],
    grouping: tuple[int, int],
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    window: int | None,
) -> None:
    for ops, device in IMPLEMENTATIONS.values():
        with torch.device(device):
            seqs = Sequences(Model(*grouping, head_dim, block_tokens, dtype), chunks)
            seqs.prime(ops)
            assert_close(seqs.step(ops, chunks, window=window), seqs.expected(window=window), dtype)


# Linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 17, 32, 64, 130, 300])
@pytest.mark.parametrize(("n", "k"), [(96, 64), (131, 77), (512, 1376)])
def test_linear(ops: Ops, dtype: torch.dtype, packed: bool, tokens: int, n: int, k: int) -> None:
    x, weight, bias = torch.randn(tokens, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    handle = ops.pack_weight(weight) if packed else weight
    plain = x.double() @ weight.double().T
    assert_close(ops.linear(x, handle), plain, dtype)
    assert_close(ops.linear(x, handle, bias), plain + bias.double(), dtype)


@pytest.mark.parametrize("ops", [name for name in IMPLEMENTATIONS if name.startswith("cpp")], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize(("n", "k"), [(96, 64), (131, 76), (512, 1376)])
@pytest.mark.parametrize("tokens", [1, 4, 5, 17, 33, 64])
def test_a_weight_in_tiles_of_either_width(ops: Ops, dtype: torch.dtype, width: int, n: int, k: int, tokens: int) -> None:
    """Whichever of them oneDNN makes on this machine."""
    pair = 2 if dtype is BF16 else 1
    x, weight, bias = torch.randn(tokens, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    rows = F.pad(weight, (0, 0, 0, -n % width))
    tiles = rows.view(-1, width, k // pair, pair).transpose(1, 2).contiguous()
    handle = PackedWeight(tiles, n, k, tiles.data_ptr(), width)
    assert_close(ops.linear(x, handle, bias), x.double() @ weight.double().T + bias.double(), dtype)


# Batches and layouts


def test_a_batch_places_every_token() -> None:
    batch = BatchLayout.build([3, 1], [18, 5], block_tables=[[7, 4], [9]], block_tokens=16)
    assert batch.query_start.tolist() == [0, 3, 4]
    assert batch.table_start.tolist() == [0, 2, 3]
    assert batch.positions.tolist() == [15, 16, 17, 4]
    assert batch.slot_of_token.tolist() == [7, 4, 4, 9]
    assert batch.offset_of_token.tolist() == [15, 0, 1, 4]
    assert (batch.num_seqs, batch.num_tokens) == (2, 4)


@pytest.mark.parametrize(
    ("queries", "contexts", "tables"), [([2], [1], [[0]]), ([1], [17], [[0]]), ([0], [4], [[0]]), ([], [], [])]
)
def test_a_batch_that_does_not_fit_is_refused(queries: list[int], contexts: list[int], tables: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="batch: expected"):
        BatchLayout.build(queries, contexts, block_tables=tables, block_tokens=16)


def test_the_layout_is_layer_contiguous() -> None:
    layout = KvLayout(num_layers=8, num_kv_heads=4, head_dim=64, block_tokens=64, dtype=BF16)
    assert layout.token_bytes == 8192  # 8 KiB of KV a token
    assert layout.slot_bytes == 8 * layout.layer_bytes == 64 * 8192


@pytest.mark.parametrize(("field", "value"), [("block_tokens", 20), ("head_dim", 33), ("dtype", torch.int8), ("num_layers", 0)])
def test_an_impossible_layout_is_refused(field: str, value: object) -> None:
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "block_tokens": 64, "dtype": BF16, field: value}
    with pytest.raises(ValueError, match="expected"):
        KvLayout(**shape)  # type: ignore[arg-type]


# What is chosen, and what is refused


def test_the_environment_forces_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVASIR_KERNELS", "torch")
    ops = load_ops("cpu")
    assert (ops.name, ops.reason) == ("torch", "KVASIR_KERNELS=torch")


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ops = load_ops("cpu")
    assert ops.name == "torch"
    assert "no C++ compiler on PATH" in ops.reason


def test_a_compiler_that_fails_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: no such thing" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ops = load_ops("cpu")
    assert ops.name == "torch"
    assert "error: no such thing" in ops.reason


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 64), (BF16, 80 + 8), (BF16, 512)])
def test_what_the_kernels_do_not_know_goes_to_torch(dtype: torch.dtype, head_dim: int) -> None:
    assert load_ops("cpu", dtype=dtype, head_dim=head_dim).name == "torch"


@pytest.mark.parametrize("ops", [name for name in IMPLEMENTATIONS if name != "triton"], indirect=True)
def test_a_slot_outside_the_arena_is_refused(ops: Ops) -> None:
    """On a GPU it would be the end of the process; the engine refuses such pages before."""
    model = Model(heads=2, kv_heads=1, head_dim=32, block_tokens=16, dtype=F32)
    seqs = Sequences(model, [Chunk(0, 4)])
    seqs.tables = [[seqs.kv.num_slots]]
    with pytest.raises(IndexError):
        seqs.step(ops, seqs.chunks)


def test_several_threads_may_call_at_once(ops: Ops) -> None:
    x, weight = torch.randn(4, 256), torch.randn(2048, 256)
    expected = x.double() @ weight.double().T
    with ThreadPoolExecutor(4) as threads:
        for done in threads.map(lambda _: ops.linear(x, weight), range(64)):
            assert_close(done, expected, F32)


@pytest.mark.parametrize("ops", [name for name in IMPLEMENTATIONS if name.startswith("cpp")], indirect=True)
def test_a_child_process_has_helpers_of_its_own(ops: Ops) -> None:
    x, weight = torch.randn(1, 256).to(BF16), torch.randn(2048, 256).to(BF16)
    expected = ops.linear(x, weight)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(ops.linear(x, weight), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
