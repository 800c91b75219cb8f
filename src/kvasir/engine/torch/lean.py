"""The lean forward: Llama, Mistral, Qwen2 and Qwen3 in nine fused operations a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor

from kvasir.core.errors import ModelError
from kvasir.engine.checkpoint import LEAN_ARCHITECTURES
from kvasir.engine.interface import ModelSpec
from kvasir.engine.torch.config import DTYPES, layer_windows, rotary_tables
from kvasir.engine.torch.kernels import BatchLayout, Ops, PackedWeight
from kvasir.engine.torch.kv import KvAccess
from kvasir.engine.torch.weights import Weights

Progress = Callable[[float, str], None]
"""Told how far loading is, from 0 to 1, and what is being done."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A projection: weight [N, K] or packed, bias [N]."""

    weight: Tensor | PackedWeight
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights; `window` is its sliding window."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


@dataclass(frozen=True, slots=True)
class SampleRows:
    """The tokens whose logits are wanted: their rows among the step's tokens, and the layout of them alone.

    The last layer's attention and everything after it is computed for these only. Where every token is wanted, as in a
    decode step, `batch` is the step's own.
    """

    rows: Tensor
    batch: BatchLayout


def is_lean(spec: ModelSpec, config: Any) -> bool:
    """Whether this checkpoint is of a shape that the lean forward computes."""
    return spec.architecture in LEAN_ARCHITECTURES and config.hidden_act in ("silu", "swish")


class LeanModel:
    """A decoder whose forward goes through `Ops`. T tokens of a step, S of them sampled, hidden size H."""

    def __init__(
        self, spec: ModelSpec, config: Any, *, ops: Ops, device: torch.device, on_progress: Progress | None = None
    ) -> None:
        self._ops = ops
        self._eps = float(config.rms_norm_eps)
        self._scale = float(spec.shape.head_dim**-0.5)
        cos, sin = rotary_tables(config, spec.max_model_len)
        self._cos, self._sin = cos.to(device), sin.to(device)
        loader = _Loader(spec, config, ops=ops, device=device)
        self._layers: list[Layer] = []
        for index in range(spec.shape.num_layers):
            self._layers.append(loader.layer(index))
            if on_progress is not None:
                on_progress((index + 1) / (spec.shape.num_layers + 1), f"layer {index + 1} of {spec.shape.num_layers}")
        self._embedding, self._norm, self._head = loader.embedding(), loader.norm(), loader.head()

    def forward(self, tokens: Tensor, batch: BatchLayout, *, kv: KvAccess, sample: SampleRows | None) -> Tensor | None:
        """Logits [S, vocab] of the sampled rows; None without any. KV of all tokens is written."""
        return self.stage(tokens, batch, kv=kv, sample=sample, layers=range(len(self._layers)))

    def stage(self, x: Tensor, batch: BatchLayout, *, kv: KvAccess, sample: SampleRows | None, layers: range) -> Tensor | None:
        """These layers alone: from tokens, int64 [T], if they are the first, else from the residual stream [T, H], overwritten.

        Returns the residual stream after them, or after the last layer what `forward` does.
        """
        hidden = self.embed(x) if layers.start == 0 else x
        result = self.run_layers(hidden, batch, kv=kv, sample=sample, first=layers.start, last=layers.stop)
        return result if result is None or layers.stop < len(self._layers) else self.logits(result)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [T] -> [T, H]."""
        return F.embedding(tokens, self._embedding)

    def run_layers(
        self,
        hidden: Tensor,
        batch: BatchLayout,
        *,
        kv: KvAccess,
        sample: SampleRows | None,
        first: int = 0,
        last: int | None = None,
    ) -> Tensor | None:
        """A stage: layers [first, last) over the residual stream [T, H], which is overwritten -> [T, H].

        A stage that ends with the model's last layer returns the sampled rows alone, [S, H], or None without any.
        """
        num_layers = len(self._layers)
        last = num_layers if last is None else last
        residual = hidden
        normed = self._ops.rms_norm(residual, self._layers[first].input_norm, self._eps)
        for index in range(first, last):
            layer = self._layers[index]
            q = self._store(normed, batch, kv=kv, index=index)
            if index == num_layers - 1:
                if sample is None:
                    kv.after_layer(index)
                    return None
                if sample.batch is not batch:
                    q, residual, batch = q[sample.rows], residual[sample.rows], sample.batch
            mixed = self._ops.attention(q, batch, kv=kv.view, layer=index, scale=self._scale, sliding_window=layer.window)
            kv.after_layer(index)
            x = self._mlp(mixed, residual, layer)
            if index + 1 < last:
                normed = self._ops.add_rms_norm(x, residual, weight=self._layers[index + 1].input_norm, eps=self._eps)
        return residual.add_(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output layer: [S, H] -> [S, vocab]."""
        return self._linear(self._ops.rms_norm(hidden, self._norm, self._eps), self._head)

    def _store(self, normed: Tensor, batch: BatchLayout, *, kv: KvAccess, index: int) -> Tensor:
        """q of all tokens, [T, heads, head_dim]; their K and V go to the pages."""
        layer = self._layers[index]
        qkv = self._linear(normed, layer.qkv)
        kv.before_layer(index)
        return self._ops.rope_and_store(
            qkv,
            batch,
            kv=kv.view,
            layer=index,
            cos=self._cos,
            sin=self._sin,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=self._eps,
        )

    def _mlp(self, mixed: Tensor, residual: Tensor, layer: Layer) -> Tensor:
        """From attention's output to the layer's; `residual` takes attention's part here, the caller adds the result."""
        ops = self._ops
        normed = ops.add_rms_norm(self._linear(mixed, layer.out), residual, weight=layer.post_norm, eps=self._eps)
        return self._linear(ops.silu_mul(self._linear(normed, layer.gate_up)), layer.down)

    def _linear(self, x: Tensor, linear: Linear) -> Tensor:
        return self._ops.linear(x, linear.weight, linear.bias)


class _Loader:
    """From the checkpoint's names to fused, packed weights."""

    def __init__(self, spec: ModelSpec, config: Any, *, ops: Ops, device: torch.device) -> None:
        self._weights = Weights(Path(spec.path), dtype=DTYPES[spec.dtype], device=device)
        self._shape = spec.shape
        self._windows = layer_windows(config)
        self._is_tied = bool(config.tie_word_embeddings)
        self._ops = ops

    def layer(self, index: int) -> Layer:
        s, prefix = self._shape, f"model.layers.{index}."
        q_width, kv_width = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        attention = [f"{prefix}self_attn.{name}_proj" for name in "qkv"]
        mlp = [f"{prefix}mlp.{name}_proj" for name in ("gate", "up")]
        return Layer(
            input_norm=self._weights.get(f"{prefix}input_layernorm.weight", s.hidden),
            qkv=self._fused(attention, q_width + 2 * kv_width, s.hidden),
            q_norm=self._weights.find(f"{prefix}self_attn.q_norm.weight", s.head_dim),
            k_norm=self._weights.find(f"{prefix}self_attn.k_norm.weight", s.head_dim),
            out=self._fused([f"{prefix}self_attn.o_proj"], s.hidden, q_width),
            post_norm=self._weights.get(f"{prefix}post_attention_layernorm.weight", s.hidden),
            gate_up=self._fused(mlp, 2 * s.intermediate, s.hidden),
            down=self._fused([f"{prefix}mlp.down_proj"], s.hidden, s.intermediate),
            window=self._windows[index],
        )

    def embedding(self) -> Tensor:
        return self._weights.get("model.embed_tokens.weight", self._shape.vocab, self._shape.hidden)

    def norm(self) -> Tensor:
        return self._weights.get("model.norm.weight", self._shape.hidden)

    def head(self) -> Linear:
        name = "model.embed_tokens" if self._is_tied else "lm_head"
        if f"{name}.weight" not in self._weights:
            raise ModelError(f"the weights have no {name}.weight and config.json does not tie it to the embedding")
        return self._fused([name], self._shape.vocab, self._shape.hidden)

    def _fused(self, modules: list[str], out_features: int, in_features: int) -> Linear:
        weight = self._weights.fuse([f"{name}.weight" for name in modules], out_features, in_features)
        bias = self._weights.find_fused([f"{name}.bias" for name in modules], out_features)
        return Linear(self._ops.pack_weight(weight), bias)
