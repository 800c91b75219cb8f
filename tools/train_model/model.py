"""The Llama forward pass, lean enough to train on two CPU cores; weights carry their Hugging Face names."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone reads
from torch import Tensor

Weights = dict[str, Tensor]

MATMUL_ATTENTION_MAX = 512  # measured: below, plain batched products beat the fused kernel; above, memory decides


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the model: 5.77 million weights, 11.5 MB in bfloat16."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 768
    rope_theta: float = 500_000.0
    max_positions: int = 16_384
    norm_eps: float = 1e-5


def initial_weights(shape: Shape, seed: int) -> Weights:
    """Float32 weights: normal 0.02, the layers' outputs scaled down by depth, norms at one."""
    generator = torch.Generator().manual_seed(seed)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        sizes |= {
            layer + "input_layernorm.weight": (shape.hidden,),
            layer + "self_attn.q_proj.weight": (q, shape.hidden),
            layer + "self_attn.k_proj.weight": (kv, shape.hidden),
            layer + "self_attn.v_proj.weight": (kv, shape.hidden),
            layer + "self_attn.o_proj.weight": (shape.hidden, q),
            layer + "post_attention_layernorm.weight": (shape.hidden,),
            layer + "mlp.gate_proj.weight": (shape.mlp, shape.hidden),
            layer + "mlp.up_proj.weight": (shape.mlp, shape.hidden),
            layer + "mlp.down_proj.weight": (shape.hidden, shape.mlp),
        }
    sizes["model.norm.weight"] = (shape.hidden,)
    weights = {}
    for name, size in sizes.items():
        if len(size) == 1:
            weights[name] = torch.ones(size)
            continue
        deviation = 0.02 if "o_proj" not in name and "down_proj" not in name else 0.02 / math.sqrt(2 * shape.layers)
        weights[name] = torch.empty(size).normal_(0.0, deviation, generator=generator)
    return weights


class Forward:
    """Runs the model over one batch; `compiled` fuses the element-wise work (needs a C++ compiler)."""

    def __init__(self, shape: Shape, *, compiled: bool) -> None:
        self.shape = shape
        wrap: Callable[..., Callable[..., Tensor]] = torch.compile if compiled else _as_is
        self._before = wrap(_before_attention, dynamic=False)
        self._after = wrap(_after_attention, dynamic=False)
        self._loss = wrap(_weighted_loss, dynamic=False)

    def hidden(self, weights: Weights, tokens: Tensor, positions: Tensor) -> Tensor:
        """The last hidden states (before the final norm) of `tokens`, both arguments `(batch, length)` int64."""
        x = F.embedding(tokens, weights["model.embed_tokens.weight"])
        cos, sin = rotary(self.shape, positions, x.dtype)
        for i in range(self.shape.layers):
            w = _layer(weights, i)
            qkv = self._before(x, w["input"], w["q"], w["k"], w["v"], cos, sin, self.shape)
            a = _attention(qkv, self.shape)
            x = self._after(x, a, w["o"], w["post"], w["gate"], w["up"], w["down"], self.shape)
        return x

    def loss(self, weights: Weights, tokens: Tensor, positions: Tensor, importance: Tensor) -> Tensor:
        """The sum of importance-weighted cross entropies of each next token; `importance[:, i]` weighs token i."""
        x = self.hidden(weights, tokens[:, :-1], positions[:, :-1])
        norm, head = weights["model.norm.weight"], weights["model.embed_tokens.weight"]
        return self._loss(x, norm, head, tokens[:, 1:], importance[:, 1:], self.shape.norm_eps)


def rotary(shape: Shape, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine `(batch, length, 1, head_dim)` in the half-split layout of Llama."""
    steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = positions[..., None].float() * shape.rope_theta**-steps
    angles = torch.cat((angles, angles), -1)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _layer(weights: Weights, i: int) -> Weights:
    layer = f"model.layers.{i}."
    attention = {k: weights[f"{layer}self_attn.{k}_proj.weight"] for k in "qkvo"}
    mlp = {k: weights[f"{layer}mlp.{k}_proj.weight"] for k in ("gate", "up", "down")}
    norms = {
        "input": weights[layer + "input_layernorm.weight"],
        "post": weights[layer + "post_attention_layernorm.weight"],
    }
    return attention | mlp | norms


def _before_attention(
    x: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, shape: Shape
) -> Tensor:
    """Queries, keys (rotated) and values of all heads, `(batch, length, heads, head_dim)`."""
    batch, length, _ = x.shape
    qkv = F.linear(_rms_norm(x, norm, shape.norm_eps), torch.cat((q, k, v))).view(batch, length, -1, shape.head_dim)
    rotated = shape.heads + shape.kv_heads
    turned, values = qkv[:, :, :rotated], qkv[:, :, rotated:]
    left, right = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-right, left), -1) * sin, values), 2)


def _after_attention(
    x: Tensor, a: Tensor, o: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, shape: Shape
) -> Tensor:
    x = x + F.linear(a, o)
    h = _rms_norm(x, norm, shape.norm_eps)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def _weighted_loss(x: Tensor, norm: Tensor, head: Tensor, target: Tensor, importance: Tensor, eps: float) -> Tensor:
    logits = F.linear(_rms_norm(x, norm, eps), head).float()
    return ((logits.logsumexp(-1) - logits.gather(-1, target[..., None])[..., 0]) * importance).sum()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _attention(qkv: Tensor, shape: Shape) -> Tensor:
    batch, length = qkv.shape[:2]
    groups = shape.heads // shape.kv_heads
    q, k, v = qkv.transpose(1, 2).split_with_sizes((shape.heads, shape.kv_heads, shape.kv_heads), 1)
    if length <= MATMUL_ATTENTION_MAX:
        grouped = (batch * shape.kv_heads, groups * length, shape.head_dim)
        flat = (batch * shape.kv_heads, length, shape.head_dim)
        a = _CausalAttention.apply(q.reshape(grouped), k.reshape(flat), v.reshape(flat))  # type: ignore[no-untyped-call]
    else:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    heads: Tensor = a.reshape(batch, shape.heads, length, shape.head_dim)
    return heads.transpose(1, 2).reshape(batch, length, -1)


class _CausalAttention(torch.autograd.Function):
    """Attention by whole batched products: queries `(n, groups * length, d)`, keys and values `(n, length, d)`."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        length = k.shape[1]
        mask = torch.full((length, length), -1e9).triu(1).to(q.dtype).repeat(q.shape[1] // length, 1)
        p = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        return p @ v

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        q, k, v, p = ctx.saved_tensors
        scores = torch._softmax_backward_data(grad @ v.transpose(1, 2), p, -1, p.dtype)
        scale = q.shape[-1] ** -0.5
        return scores @ k * scale, scores.transpose(1, 2) @ q * scale, p.transpose(1, 2) @ grad


def _as_is(function: Callable[..., Tensor], *, dynamic: bool) -> Callable[..., Tensor]:
    del dynamic
    return function
