"""The operations of a decoder's forward: one Protocol, two implementations."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvasir.engine.torch.kernels.batch import BatchLayout
from kvasir.engine.torch.kernels.layout import KvView


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A linear layer's weight in an order of its implementation's own; only `linear` of the same Ops reads it.

    `data` holds the elements, outputs rounded up to whole tiles: no second copy of the weight is kept. They lie at `address`
    in tiles of `width` outputs; both are 0 where that order is not one that our own kernel for few tokens can read.
    """

    data: Tensor
    out_features: int
    in_features: int
    address: int = 0
    width: int = 0


@dataclass(frozen=True, slots=True)
class TokenCopies:
    """Single tokens to be copied, int64 [n] each: the one at `offsets[i]` of slot `sources[i]` goes to that of `targets[i]`."""

    sources: Tensor
    targets: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets)


class Ops(Protocol):
    """What one decoder layer needs beside the model's own structure. T new tokens, in the order of the BatchLayout.

    Tensors are contiguous, activations and weights of one dtype (float32, bfloat16; TorchOps float16 as well), sums
    are float32. Results are new tensors unless a docstring says that an argument is written. A result does not depend
    on the number of threads, nor, beyond rounding, on what else is in the batch or on how a prompt is cut into chunks.
    """

    @property
    def name(self) -> str:
        """`cpp` or `torch`."""

    @property
    def reason(self) -> str:
        """Why this implementation and not the other, one line for the log."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) rounded to the dtype of x, times weight: [T, H] -> [T, H], as LlamaRMSNorm."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, *, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place, then rms_norm(residual): [T, H] -> [T, H]."""

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
        """Split, normalise and rotate; K and V go to their places in the arena, q is returned: [T, heads, head_dim].

        `qkv` is [T, (heads + 2 * kv_heads) * head_dim]: q heads, then k heads, then v heads. `q_norm` and `k_norm`
        [head_dim] are per-head RMSNorm weights (Qwen3), applied before the rotation. `cos` and `sin` are float32
        [max_position, rotary_dim / 2]; the rotation pairs dimension i with i + rotary_dim / 2 (rotate_half), and leaves
        dimensions from rotary_dim on as they are. Writes layer `layer` of `kv` at each token's slot and offset.
        """

    def attention(
        self, q: Tensor, batch: BatchLayout, *, kv: KvView, layer: int, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        """Causal attention of the new tokens over their sequences: [T, heads, head_dim] -> [T, heads * head_dim].

        The new tokens' own K and V are in the arena already (rope_and_store). With a sliding window of w a token sees
        itself and the w - 1 before it; blocks wholly outside every new token's window are not read.
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of [T, 2 * I], gate first -> [T, I]."""

    def linear(self, x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias: [T, K], [N, K], [N] -> [T, N]."""

    def pack_weight(self, weight: Tensor) -> Tensor | PackedWeight:
        """The weight [N, K] in the order that `linear` likes best; the caller drops the original.

        Returns the weight itself where packing gains nothing.
        """

    def copy_tokens(self, source: KvView, target: KvView, *, layer: int, tokens: TokenCopies) -> None:
        """K and V of single tokens from one memory to another of the same layout.

        Where V of two tokens lies together, the other one's may be copied as well: the token before is the same in both
        memories, the token after nobody has written yet.
        """
