"""The operations on a GPU, by Triton kernels; large products are torch's."""

from __future__ import annotations

from torch import Tensor

from kvasir.engine.torch.kernels.batch import BatchLayout
from kvasir.engine.torch.kernels.gpu import rows
from kvasir.engine.torch.kernels.gpu.attention import AttentionPlan, paged_attention
from kvasir.engine.torch.kernels.layout import KvView
from kvasir.engine.torch.kernels.ops import TokenCopies
from kvasir.engine.torch.kernels.torch_ops import TorchOps


class TritonOps(TorchOps):
    """`Ops` on CUDA: float32, bfloat16 and float16, any head size. One thread steps through it."""

    name = "triton"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self._planned: tuple[BatchLayout, AttentionPlan] | None = None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rows.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, *, weight: Tensor, eps: float) -> Tensor:
        return rows.rms_norm(x, weight, eps, residual=residual)

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
        return rows.rope_and_store(qkv, batch, kv=kv, layer=layer, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm, eps=eps)

    def attention(
        self, q: Tensor, batch: BatchLayout, *, kv: KvView, layer: int, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        plan = self._plan(batch, heads=q.shape[1], kv_heads=kv.layout.num_kv_heads)
        return paged_attention(q, batch, plan, kv=kv, layer=layer, scale=scale, sliding_window=sliding_window)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return rows.silu_mul(gate_up)

    def copy_tokens(self, source: KvView, target: KvView, *, layer: int, tokens: TokenCopies) -> None:
        rows.copy_tokens(source, target, layer=layer, tokens=tokens)

    def _plan(self, batch: BatchLayout, *, heads: int, kv_heads: int) -> AttentionPlan:
        """Made at a step's first layer, kept for its others."""
        if self._planned is None or self._planned[0] is not batch:
            self._planned = (batch, AttentionPlan.of(batch, heads=heads, kv_heads=kv_heads))
        return self._planned[1]
