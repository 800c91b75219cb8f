"""Seconds from first principles: the larger of FLOP over FLOP/s and bytes over bytes/s, and a fixed overhead.

The roofline model (Williams, Waterman, Patterson, CACM 2009) applied to a transformer's two phases, as in the Mooncake
paper's break-even formula (FAST'25, section 3): prefill is bound by arithmetic, decode by reading weights and KV.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from kvasir.costs.hardware import HARDWARE, Hardware
from kvasir.costs.model import Counts
from kvasir.costs.shape import ModelShape

LLAMA3_70B = ModelShape(
    num_layers=80,
    hidden=8192,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    intermediate=28672,
    vocab=128256,
    num_params=70_000_000_000,
    dtype_bytes=2,
)
"""The paper's model, counted as 70e9 weights as everybody does (70.6e9 exactly); 320 KiB of KV a token."""


class RooflineCost(Struct, frozen=True, tag=True):
    """A CostModel for one instance that has a whole node.

    With `one_bound_each`, prefill counts FLOP only and decode bytes only, as simple models do; the difference shows for
    prompts of a few tokens, whose prefill still reads all weights, and for very large decode batches.
    """

    shape: ModelShape
    hardware: Hardware
    one_bound_each: bool = False

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        """max((2·P·n + 4·d·L·(n·p + n²/2)) / FLOP/s, (weights + KV of p and n) / B/s) + overhead; 0 for no token."""
        if new_tokens <= 0:
            return 0.0
        hw, shape = self.hardware, self.shape
        seconds = shape.prefill_flops(new_tokens, cached_tokens) / hw.effective_flops
        if not self.one_bound_each:
            seconds = max(seconds, self._read_s(new_tokens + cached_tokens))
        return hw.prefill_overhead_s + seconds

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        """max((weights + KV of all contexts) / B/s, (2·P·batch + 4·d·L·contexts) / FLOP/s) + overhead; 0 for no sequence."""
        if batch <= 0:
            return 0.0
        hw, shape = self.hardware, self.shape
        seconds = (shape.weight_bytes + context_tokens * shape.kv_bytes_per_token) / hw.effective_memory_bandwidth
        if not self.one_bound_each:
            flops_s = (shape.linear_flops * batch + shape.attention_flops * context_tokens) / hw.effective_flops
            if flops_s > seconds:
                seconds = flops_s
        return hw.step_overhead_s + seconds

    def decode_steps_s(self, batch: Counts, context_tokens: Counts) -> npt.NDArray[np.float64]:
        hw, shape = self.hardware, self.shape
        read_bytes = shape.weight_bytes + context_tokens * float(shape.kv_bytes_per_token)
        seconds: npt.NDArray[np.float64] = np.true_divide(read_bytes, hw.effective_memory_bandwidth)
        if not self.one_bound_each:
            flops = shape.linear_flops * batch + shape.attention_flops * context_tokens
            seconds = np.maximum(seconds, np.true_divide(flops, hw.effective_flops))
        return hw.step_overhead_s + seconds

    def transfer_s(self, num_bytes: int) -> float:
        """Latency + bytes over the node's network bandwidth; 0 for nothing."""
        if num_bytes <= 0:
            return 0.0
        return self.hardware.network_latency_s + num_bytes / self.hardware.network_bandwidth

    def _read_s(self, kv_tokens: int) -> float:
        num_bytes = self.shape.weight_bytes + kv_tokens * self.shape.kv_bytes_per_token
        return num_bytes / self.hardware.effective_memory_bandwidth


def reference_cost() -> RooflineCost:
    """The simple model behind the published comparison tables: LLaMA3-70B on 8 x A800 at 50 % of FLOP/s and 75 % of 2.0 TB/s.

    Prefill 10 ms + FLOP / FLOP/s, decode step 8 ms + bytes / B/s, 80 GB/s between nodes without latency.
    """
    node = replace(HARDWARE["a800"], memory_bandwidth=2.0e12, network_latency_s=0.0)
    return RooflineCost(LLAMA3_70B, node, one_bound_each=True)
