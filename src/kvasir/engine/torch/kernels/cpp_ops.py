"""The operations by the C++ kernels, called through ctypes (which releases the GIL)."""

from collections.abc import Callable
from contextlib import suppress
from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor

from kvasir.engine.torch.kernels.batch import BatchLayout
from kvasir.engine.torch.kernels.layout import KvView
from kvasir.engine.torch.kernels.ops import PackedWeight, TokenCopies
from kvasir.engine.torch.kernels.torch_ops import copy_tokens

MAX_HEAD_DIM = 256
# Up to this many tokens our own kernel streams the weight faster than oneDNN multiplies (docs/decisions/0001-cpu-attention.md).
FEW_TOKENS_PACKED = 64
FEW_TOKENS_PLAIN = 32
WIDE_TILE, NARROW_TILE = 64, 32  # outputs of a tile in oneDNN's packing: 32 where it uses AMX
WIDE_TOKENS = 16  # from so many tokens on arithmetic is what takes time, not reading the weight
PACK_FOR_TOKENS = 512  # what oneDNN is told to expect; told of one token, it leaves float32 weights as they are

_SIGNATURES: dict[str, list[Any]] = {  # ctypes' own types for its argument types are private
    "kvasir_rms_norm": [c_int, *[c_void_p] * 4, c_int, c_int, c_float, c_int],
    "kvasir_silu_mul": [c_int, c_void_p, c_void_p, c_int, c_int, c_int],
    "kvasir_rope_and_store": [
        *[c_int, c_void_p, c_void_p, c_void_p, c_int, c_int],
        *[c_void_p, c_int64, c_int, c_int, c_int, c_int, c_int],
        *[c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p, c_float, c_int],
    ],
    "kvasir_attention": [
        *[c_int, c_void_p, c_void_p, c_void_p, c_int, c_int],
        *[c_void_p, c_int64, c_int, c_int, c_int, c_int, c_int, c_float, c_int, c_int, c_int],
    ],
    "kvasir_linear": [c_int, c_int, c_int, *[c_void_p] * 4, c_int, c_int, c_int, c_int],
    "kvasir_linear_widened": [*[c_void_p] * 5, c_int, c_int, c_int, c_int],
    "kvasir_is_tiled": [c_int, c_void_p, c_void_p, c_int, c_int, c_int, c_int],
}


class Arithmetic(IntEnum):
    """How products of bf16 of many rows are computed (docs/decisions/0001-cpu-attention.md)."""

    DOT = 0
    FLOAT32 = 1
    AMX = 2


def fastest_arithmetic(has_amx: bool) -> Arithmetic:
    """By what the machine is and not by a clock, so that every process of it rounds alike.

    Intel's cores take twice as long for a bf16 dot product as for float32's.
    """
    if has_amx:
        return Arithmetic.AMX
    with suppress(OSError):
        if "GenuineIntel" in Path("/proc/cpuinfo").read_text():
            return Arithmetic.FLOAT32
    return Arithmetic.DOT


_SAID = {Arithmetic.DOT: "its dot product", Arithmetic.FLOAT32: "float32 arithmetic", Arithmetic.AMX: "AMX"}


class CppOps:
    """`Ops` on a CPU, float32 and bfloat16, head_dim a multiple of 16 up to 256.

    Every call uses up to torch.get_num_threads() cores, by helpers of the library's own (csrc/pool.h says why not by
    OpenMP). Large products are oneDNN's and run on torch's OpenMP threads: start the process with
    OMP_WAIT_POLICY=PASSIVE, or these keep a core busy for some milliseconds after each.
    """

    name = "cpp"

    def __init__(self, library: Path, *, arithmetic: Arithmetic | None = None) -> None:
        """`arithmetic` for bf16; None: what is fastest here."""
        loaded = CDLL(str(library))
        if arithmetic is None:
            arithmetic = fastest_arithmetic(has_amx=bool(loaded.kvasir_has_amx()))
        self._arithmetic = arithmetic
        self.reason = f"C++ kernels, {library.name}, bf16 by {_SAID[arithmetic]}"
        self._rms_norm = _function(loaded, "kvasir_rms_norm")
        self._silu_mul = _function(loaded, "kvasir_silu_mul")
        self._rope_and_store = _function(loaded, "kvasir_rope_and_store")
        self._attention = _function(loaded, "kvasir_attention")
        self._linear = _function(loaded, "kvasir_linear")
        self._linear_widened = _function(loaded, "kvasir_linear_widened")
        self._is_tiled = _function(loaded, "kvasir_is_tiled")
        self._linear_by_onednn = torch.ops.mkldnn._linear_pointwise.default

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, None, weight=weight, eps=eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, *, weight: Tensor, eps: float) -> Tensor:
        _expect(residual, x.dtype, shape=x.shape)
        return self._norm(x, residual.data_ptr(), weight=weight, eps=eps)

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
        lay = kv.layout
        heads = qkv.shape[1] // lay.head_dim - 2 * lay.num_kv_heads
        _expect(qkv, lay.dtype, shape=(batch.num_tokens, (heads + 2 * lay.num_kv_heads) * lay.head_dim))
        _expect(cos, torch.float32, shape=sin.shape)
        _expect(sin, torch.float32, shape=cos.shape)
        q = qkv.new_empty((batch.num_tokens, heads, lay.head_dim))
        failed = self._rope_and_store(
            *(lay.dtype is torch.bfloat16, qkv.data_ptr(), q.data_ptr()),
            *(batch.ints.data_ptr(), batch.num_seqs, batch.num_tokens),
            *(_layer_address(kv, layer), kv.slot_stride, kv.num_slots),
            *(heads, lay.num_kv_heads, lay.head_dim, lay.block_tokens),
            *(cos.data_ptr(), sin.data_ptr(), cos.shape[1], cos.shape[0]),
            *(_norm_address(q_norm, lay.head_dim, lay.dtype), _norm_address(k_norm, lay.head_dim, lay.dtype), eps),
            torch.get_num_threads(),
        )
        if failed:
            raise IndexError(f"rope_and_store: a slot is not among {kv.num_slots} or a position not among {len(cos)}")
        return q

    def attention(
        self, q: Tensor, batch: BatchLayout, *, kv: KvView, layer: int, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        lay = kv.layout
        heads = q.shape[1]
        _expect(q, lay.dtype, shape=(batch.num_tokens, heads, lay.head_dim))
        if heads % lay.num_kv_heads or (sliding_window is not None and sliding_window < 1):
            raise ValueError(f"attention: {heads} heads, {lay.num_kv_heads} KV heads, window {sliding_window}")
        out = q.new_empty((batch.num_tokens, heads * lay.head_dim))
        failed = self._attention(
            *(lay.dtype is torch.bfloat16, q.data_ptr(), out.data_ptr()),
            *(batch.ints.data_ptr(), batch.num_seqs, batch.num_tokens),
            *(_layer_address(kv, layer), kv.slot_stride, kv.num_slots),
            *(heads, lay.num_kv_heads, lay.head_dim, lay.block_tokens),
            *(scale, sliding_window or 0, self._arithmetic, torch.get_num_threads()),
        )
        if failed:
            raise IndexError(f"attention: a slot of the block table is not among {kv.num_slots}")
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        _expect(gate_up, gate_up.dtype, shape=(tokens, 2 * width))
        out = gate_up.new_empty((tokens, width))
        self._silu_mul(_is_bf16(gate_up.dtype), gate_up.data_ptr(), out.data_ptr(), tokens, width, torch.get_num_threads())
        return out

    def linear(self, x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
        tokens = x.shape[0]
        if isinstance(weight, PackedWeight):
            widens = self._arithmetic is Arithmetic.FLOAT32 and weight.width == WIDE_TILE
            if widens and x.dtype is torch.bfloat16 and tokens >= WIDE_TOKENS:
                return self._linear_in_float32(x, weight, bias)
            if tokens > FEW_TOKENS_PACKED or not weight.width:
                done: Tensor = self._linear_by_onednn(x, weight.data, bias, "none", [], "")
                return done
            address, width, n, k = weight.address, weight.width, weight.out_features, weight.in_features
        else:
            if tokens > FEW_TOKENS_PLAIN:
                return F.linear(x, weight, bias)
            n, k = weight.shape
            _expect(weight, x.dtype, shape=(n, k))
            address, width = weight.data_ptr(), 0
        _expect(x, x.dtype, shape=(tokens, k))
        out = x.new_empty((tokens, n))
        self._linear(
            *(_is_bf16(x.dtype), self._arithmetic is Arithmetic.AMX, width),
            *(x.data_ptr(), address, None if bias is None else bias.data_ptr(), out.data_ptr()),
            *(tokens, n, k, torch.get_num_threads()),
        )
        return out

    def _linear_in_float32(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        tokens, n, k = x.shape[0], weight.out_features, weight.in_features
        _expect(x, torch.bfloat16, shape=(tokens, k))
        wide, out = torch.empty(x.shape, dtype=torch.float32), x.new_empty((tokens, n))
        self._linear_widened(
            *(x.data_ptr(), wide.data_ptr(), weight.address, None if bias is None else bias.data_ptr(), out.data_ptr()),
            *(tokens, n, k, torch.get_num_threads()),
        )
        return out

    def copy_tokens(self, source: KvView, target: KvView, *, layer: int, tokens: TokenCopies) -> None:
        copy_tokens(source, target, layer=layer, tokens=tokens)

    def pack_weight(self, weight: Tensor) -> Tensor | PackedWeight:
        """oneDNN's own packing; our kernel reads the same bytes where they turn out to be tiles of outputs."""
        n, k = weight.shape
        is_bf16 = _is_bf16(weight.dtype)
        if is_bf16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return weight
        plain = weight.detach().contiguous()
        packed = torch.ops.mkldnn._reorder_linear_weight(plain, PACK_FOR_TOKENS)
        address = torch.ops.mkldnn.data_ptr(packed)
        if k % 2 and is_bf16:
            return PackedWeight(packed, n, k)
        for width in (WIDE_TILE, NARROW_TILE):
            tile_bytes = -(-n // width) * width * k * weight.dtype.itemsize
            if torch.ops.mkldnn._nbytes(packed) == tile_bytes and self._is_tiled(
                is_bf16, plain.data_ptr(), address, width, n, k, torch.get_num_threads()
            ):
                return PackedWeight(packed, n, k, address, width)
        return PackedWeight(packed, n, k)

    def _norm(self, x: Tensor, residual: int | None, *, weight: Tensor, eps: float) -> Tensor:
        rows, width = x.shape
        _expect(x, weight.dtype, shape=(rows, width))
        _expect(weight, x.dtype, shape=(width,))
        out = torch.empty_like(x)
        self._rms_norm(
            *(_is_bf16(x.dtype), x.data_ptr(), residual, weight.data_ptr(), out.data_ptr()),
            *(rows, width, eps, torch.get_num_threads()),
        )
        return out


def _function(library: CDLL, symbol: str) -> Callable[..., int]:
    function = library[symbol]
    function.argtypes = _SIGNATURES[symbol]
    return function


def _expect(tensor: Tensor, dtype: torch.dtype, *, shape: tuple[int, ...]) -> None:
    """The kernels read raw memory: a wrong shape would be a wrong address."""
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_contiguous():
        got = f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}"
        raise ValueError(f"expected contiguous {dtype} {tuple(shape)}, got {got}")


def _is_bf16(dtype: torch.dtype) -> bool:
    if dtype is torch.bfloat16:
        return True
    if dtype is torch.float32:
        return False
    raise ValueError(f"dtype: expected float32 or bfloat16, got {dtype}")


def _norm_address(weight: Tensor | None, head_dim: int, dtype: torch.dtype) -> int | None:
    if weight is None:
        return None
    _expect(weight, dtype, shape=(head_dim,))
    return weight.data_ptr()


def _layer_address(kv: KvView, layer: int) -> int:
    if not 0 <= layer < kv.layout.num_layers:
        raise IndexError(f"layer: expected 0..{kv.layout.num_layers - 1}, got {layer}")
    return kv.base.data_ptr() + layer * kv.layout.layer_bytes
