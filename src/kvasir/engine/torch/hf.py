"""Any other decoder-only architecture: its modelling code from transformers, with attention and KV of ours."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvasir.core.errors import ModelError
from kvasir.engine.interface import ModelSpec
from kvasir.engine.torch.config import DTYPES, first_line, layer_windows
from kvasir.engine.torch.kernels import BatchLayout, KvLayout, KvView, Ops
from kvasir.engine.torch.kv import InPlaceKv, KvAccess
from kvasir.engine.torch.lean import Progress, SampleRows

ATTENTION = "kvasir"
"""The name under which our attention is registered with transformers."""

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the largest logit; a wrong mask or position is off by about 1
_CHECK_TOKENS = 40
_SAMPLED = (24, _CHECK_TOKENS - 1)  # where the chunks of the check end
_MODEL_CODE_ERRORS = (RuntimeError, TypeError, KeyError, ValueError, AttributeError, IndexError, AssertionError, ImportError)


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What our attention needs of the step; travels through the modelling code as the keyword `kvasir_step`."""

    ops: Ops
    batch: BatchLayout
    kv: KvAccess
    windows: tuple[int | None, ...]
    unit_cos: Tensor
    zero_sin: Tensor


class HfModel:
    """A transformers model whose attention reads and writes our pages; it keeps no cache of its own.

    The constructor runs a random prompt through it, in two chunks beside another sequence, and compares the logits with the
    same model under transformers' eager attention in one piece. It raises ModelError where they differ or the model cannot
    be run so: better refused than wrong.
    """

    def __init__(
        self, spec: ModelSpec, config: Any, *, ops: Ops, device: torch.device, on_progress: Progress | None = None
    ) -> None:
        self._ops, self._device, self._architecture = ops, device, spec.architecture
        self._windows = layer_windows(config)
        self._unit_cos = torch.ones(spec.max_model_len, 1, device=device)  # a rotation by nothing: the model rotates itself
        self._zero_sin = torch.zeros(spec.max_model_len, 1, device=device)
        self._model = _from_pretrained(spec, config).to(device).eval()
        if on_progress is not None:
            on_progress(0.8, "weights loaded, comparing with transformers' own attention")
        self._has_logits_to_keep = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._refuse_if_different(spec)

    def forward(self, tokens: Tensor, batch: BatchLayout, *, kv: KvAccess, sample: SampleRows | None) -> Tensor | None:
        """Logits [S, vocab] of the sampled rows; None without any. KV of all tokens is written."""
        step = AttentionStep(self._ops, batch, kv, self._windows, self._unit_cos, self._zero_sin)
        rows = torch.arange(0) if sample is None else sample.rows
        keep = {"logits_to_keep": rows.to(self._device)} if self._has_logits_to_keep else {}
        output = self._model(
            input_ids=tokens[None], position_ids=batch.positions.long()[None], use_cache=False, kvasir_step=step, **keep
        )
        if sample is None:
            return None
        logits: Tensor = output.logits[0]
        return logits if self._has_logits_to_keep else logits[rows]

    def stage(self, x: Tensor, batch: BatchLayout, *, kv: KvAccess, sample: SampleRows | None, layers: range) -> Tensor | None:
        """Raises ModelError: the modelling code computes all layers or none."""
        raise ModelError(f"{self._architecture} runs through transformers and has no stages; run it without a pipeline")

    def _refuse_if_different(self, spec: ModelSpec) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(spec.shape.vocab, (_CHECK_TOKENS,), generator=generator).to(self._device)
        try:
            expected = self._model(input_ids=tokens[None], use_cache=False).logits[0]  # [tokens, vocab]
            self._model.set_attn_implementation(ATTENTION)
            got = self._chunked(tokens, spec)
        except _MODEL_CODE_ERRORS as error:
            raise ModelError(
                f"{spec.architecture} does not run with paged attention ({first_line(error)}); it is not supported"
            ) from None
        error_ = (got.float() - expected[list(_SAMPLED)].float()).abs().max() / expected.float().abs().max()
        if not error_ <= _TOLERANCE[DTYPES[spec.dtype]]:
            raise ModelError(
                f"{spec.architecture} gives other logits with paged attention than with transformers' own "
                f"(relative error {float(error_):.2g}); it is not supported"
            )

    def _chunked(self, tokens: Tensor, spec: ModelSpec) -> Tensor:
        """Logits at the positions `_SAMPLED`, from two chunks that each share their step with another sequence."""
        shape = spec.shape
        layout = KvLayout(shape.num_layers, shape.num_kv_heads, shape.head_dim, spec.block_tokens, DTYPES[spec.dtype])
        blocks = layout.blocks_of(_CHECK_TOKENS)
        kv = InPlaceKv(KvView.empty(2 * blocks, layout, self._device))
        tables = [list(range(2 * blocks - 1, blocks - 1, -1)), list(range(blocks))]
        logits = []
        for start, end in zip((0, *(p + 1 for p in _SAMPLED)), (p + 1 for p in _SAMPLED), strict=False):
            both = torch.cat((tokens[start:end], tokens[start:end].flip(0)))
            lens, contexts = [end - start] * 2, [end] * 2
            batch = BatchLayout.build(lens, contexts, block_tables=tables, block_tokens=spec.block_tokens, device=self._device)
            rows = SampleRows(torch.tensor([end - start - 1], device=self._device), batch)
            logits.append(self.forward(both, batch, kv=kv, sample=rows))
        return torch.cat([part for part in logits if part is not None])


def _from_pretrained(spec: ModelSpec, config: Any) -> Any:
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, _attention)
    try:
        return AutoModelForCausalLM.from_pretrained(
            spec.path, config=config, dtype=DTYPES[spec.dtype], attn_implementation="eager", use_safetensors=True
        )
    except (*_MODEL_CODE_ERRORS, OSError) as error:
        raise ModelError(f"model {spec.path}: transformers cannot load it: {first_line(error)}") from None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    kvasir_step: AttentionStep,
    **_: object,
) -> tuple[Tensor, None]:
    """Transformers' attention interface over our pages.

    query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim] -> [1, T, heads, head_dim]. The mask is the
    batch layout's: causal, within each sequence. The signature, dropout and all, is transformers'.
    """
    step, layer = kvasir_step, module.layer_idx
    assert isinstance(layer, int)
    layout = step.kv.view.layout
    _refuse_unsupported(key, value, layout=layout, softcap=softcap, sinks=s_aux)
    if sliding_window != step.windows[layer]:
        raise ModelError(f"layer {layer}: its sliding window is {sliding_window}, config.json says {step.windows[layer]}")
    qkv = torch.cat((query[0], key[0], value[0])).transpose(0, 1).flatten(1)  # [T, (heads + 2 * kv_heads) * head_dim]
    step.kv.before_layer(layer)
    q = step.ops.rope_and_store(
        qkv, step.batch, kv=step.kv.view, layer=layer, cos=step.unit_cos, sin=step.zero_sin
    )  # [T, heads, head_dim]
    scale = layout.head_dim**-0.5 if scaling is None else float(scaling)
    out = step.ops.attention(
        q, step.batch, kv=step.kv.view, layer=layer, scale=scale, sliding_window=sliding_window
    )  # [T, heads * head_dim]
    step.kv.after_layer(layer)
    return out.view(1, *q.shape), None


def _refuse_unsupported(key: Tensor, value: Tensor, *, layout: KvLayout, softcap: float | None, sinks: Tensor | None) -> None:
    if softcap is not None:
        raise ModelError("soft-capped attention scores (as in Gemma 2) are not supported")
    if sinks is not None:
        raise ModelError("attention sinks (as in gpt-oss) are not supported")
    expected = (layout.num_kv_heads, layout.head_dim)
    for states in (key, value):
        got = (states.shape[1], states.shape[3])
        if got != expected:
            raise ModelError(f"attention: expected {expected} KV heads and head size as in config.json, got {got}")
