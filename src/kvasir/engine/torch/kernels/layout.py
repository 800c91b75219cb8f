"""Where a key or a value of a token lies in the arena."""

from dataclasses import dataclass

import torch
from torch import Tensor

_PACKED_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The bytes of one arena slot: a pure function of the model's shape, the dtype and the block size.

    A slot holds one block of `block_tokens` tokens, layer by layer, so that one layer of one block is contiguous:

        slot  = [layer 0][layer 1] ... [layer L-1]
        layer = [K of head 0][K of head 1] ... [V of head 0][V of head 1] ...

        dtype     K of a head                      V of a head
        2 bytes   [head_dim/2][block_tokens][2]    [block_tokens/2][head_dim][2]
        float32   [head_dim][block_tokens]         [block_tokens][head_dim]

    The pairs are the operand order of a bf16 dot product: Q.K^T has tokens in lanes and pairs along head_dim,
    P.V has head_dim in lanes and pairs along tokens. Attention reads both in place; nothing is gathered.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in (*_PACKED_DTYPES, torch.float32):
            raise ValueError(f"KV dtype: expected bfloat16, float16 or float32, got {self.dtype}")
        if self.block_tokens < 16 or self.block_tokens % 16:
            raise ValueError(f"block_tokens: expected a multiple of 16, got {self.block_tokens}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        if self.num_layers < 1 or self.num_kv_heads < 1:
            raise ValueError(f"expected at least one layer and head, got {self.num_layers} and {self.num_kv_heads}")

    @property
    def is_packed(self) -> bool:
        """Whether elements lie in pairs (the two-byte dtypes)."""
        return self.dtype in _PACKED_DTYPES

    @property
    def head_elements(self) -> int:
        """Elements of K (or of V) of one head of one layer of one block."""
        return self.head_dim * self.block_tokens

    @property
    def layer_elements(self) -> int:
        """Elements of K and V of one layer of one block."""
        return 2 * self.num_kv_heads * self.head_elements

    @property
    def layer_bytes(self) -> int:
        """Bytes of K and V of one layer of one block; layer l starts at l * layer_bytes of its slot."""
        return self.layer_elements * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of one block, all layers."""
        return self.num_layers * self.layer_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, all layers."""
        return self.slot_bytes // self.block_tokens

    def blocks_of(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)


@dataclass(frozen=True, slots=True)
class KvView:
    """The arena as attention sees it: slot i is base[i * slot_stride : i * slot_stride + layout.slot_bytes].

    `base` is uint8 and one-dimensional, over the whole mapping; `slot_stride` may exceed `slot_bytes` (padding to 4,096).
    Kernels write through it: whoever steps a batch owns the slots that the batch's new tokens fall into.
    """

    base: Tensor
    layout: KvLayout
    slot_stride: int

    def __post_init__(self) -> None:
        if self.base.dtype != torch.uint8 or self.base.dim() != 1 or not self.base.is_contiguous():
            raise ValueError(f"arena: expected contiguous uint8 [bytes], got {self.base.dtype} {tuple(self.base.shape)}")
        if self.slot_stride < self.layout.slot_bytes or self.slot_stride % self.layout.dtype.itemsize:
            raise ValueError(f"slot_stride: expected at least {self.layout.slot_bytes}, got {self.slot_stride}")

    @classmethod
    def empty(cls, num_slots: int, layout: KvLayout, device: torch.device | str = "cpu") -> "KvView":
        """A private arena of `num_slots` zeroed slots, for tests and for engines without a node."""
        base = torch.zeros(num_slots * layout.slot_bytes, dtype=torch.uint8, device=device)
        return cls(base, layout, layout.slot_bytes)

    @property
    def num_slots(self) -> int:
        """How many whole slots the mapping holds."""
        return self.base.numel() // self.slot_stride

    def layer_of_slot(self, slot: int, layer: int) -> Tensor:
        """The bytes of one layer of one block, uint8 [layer_bytes]: what a transfer moves."""
        start = slot * self.slot_stride + layer * self.layout.layer_bytes
        return self.base[start : start + self.layout.layer_bytes]

    def keys(self, layer: int) -> Tensor:
        """K of one layer as stored, a view: [slots, kv_heads, head_dim/2, block_tokens, 2], float32 without the pairs."""
        lay = self.layout
        pairs = (lay.head_dim // 2, lay.block_tokens, 2) if lay.is_packed else (lay.head_dim, lay.block_tokens)
        return torch.unflatten(self._heads(layer, is_value=False), 2, pairs)

    def values(self, layer: int) -> Tensor:
        """V of one layer as stored, a view: [slots, kv_heads, block_tokens/2, head_dim, 2], float32 without the pairs."""
        lay = self.layout
        pairs = (lay.block_tokens // 2, lay.head_dim, 2) if lay.is_packed else (lay.block_tokens, lay.head_dim)
        return torch.unflatten(self._heads(layer, is_value=True), 2, pairs)

    def _heads(self, layer: int, *, is_value: bool) -> Tensor:
        """[slots, kv_heads, head_dim * block_tokens] of one layer's K or V."""
        lay = self.layout
        if not 0 <= layer < lay.num_layers:
            raise IndexError(f"layer: expected 0..{lay.num_layers - 1}, got {layer}")
        whole = self.base[: self.num_slots * self.slot_stride].view(lay.dtype).view(self.num_slots, -1)
        start = layer * lay.layer_elements + (lay.layer_elements // 2 if is_value else 0)
        half = whole[:, start : start + lay.layer_elements // 2]
        return torch.unflatten(half, 1, (lay.num_kv_heads, lay.head_elements))
