"""The cost models with their constants worked out: the same seconds, to the last bit, in a fraction of the time.

Only here can they be scaled to what is measured while they serve; `RooflineCost` and `FittedCost` are for files and messages. A
scheduler asks some thirty times a request.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from kvasir.costs.fitted import FittedCost
from kvasir.costs.model import CostModel, Counts
from kvasir.costs.roofline import RooflineCost

FULL_STEP: Final = 512
"""A prefill of so many tokens uses an accelerator fully: its time grows with its tokens, and is not that of reading weights."""


def quick(costs: CostModel) -> QuickCosts:
    """What answers as `costs` does; itself where there is nothing to work out."""
    if isinstance(costs, QuickCosts):
        return costs
    if isinstance(costs, RooflineCost):
        return QuickRoofline(costs)
    return QuickFitted(costs) if isinstance(costs, FittedCost) else QuickCosts(costs)


class QuickCosts:
    """Any cost model, as one class that is known when machine code is built: then a question costs less than its answer.

    What was measured since can be worked in by `scale`: then prefill and decode take so many times as long as the model says.
    """

    __slots__ = ("_costs", "_split_s", "decode_scale", "prefill_scale")

    def __init__(self, costs: CostModel):
        self._costs = costs
        self._split_s: float | None = None
        self.prefill_scale = 1.0
        self.decode_scale = 1.0

    def scale(self, prefill: float, decode: float) -> None:
        self.prefill_scale, self.decode_scale = prefill, decode
        self._split_s = None

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        return self._costs.prefill_s(new_tokens, cached_tokens) * self.prefill_scale

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        return self._costs.decode_step_s(batch, context_tokens) * self.decode_scale

    def decode_steps_s(self, batch: Counts, context_tokens: Counts) -> npt.NDArray[np.float64]:
        seconds = self._costs.decode_steps_s(batch, context_tokens)
        return seconds if self.decode_scale == 1.0 else seconds * self.decode_scale

    def transfer_s(self, num_bytes: int) -> float:
        return self._costs.transfer_s(num_bytes)

    def prompt_s(self, num_prompt_tokens: int, cached_tokens: int, chunk_tokens: int | None) -> float:
        """Computing the rest of a prompt alone, in steps of `chunk_tokens`."""
        new_tokens = num_prompt_tokens - cached_tokens
        seconds = self.prefill_s(new_tokens, cached_tokens)
        if chunk_tokens is not None and new_tokens > chunk_tokens:
            seconds += (-(-new_tokens // chunk_tokens) - 1) * self.split_s()
        return seconds

    def split_s(self) -> float:
        """What computing a prompt takes longer for each further step that it is split into, if these are not tiny."""
        if self._split_s is None:
            halves_s = self.prefill_s(FULL_STEP, 0) + self.prefill_s(FULL_STEP, FULL_STEP)
            self._split_s = min(max(0.0, halves_s - self.prefill_s(2 * FULL_STEP, 0)), self.prefill_s(1, 0))
        return self._split_s


class QuickRoofline(QuickCosts):
    """See RooflineCost for the formulas."""

    __slots__ = (
        "_attention_flops",
        "_bandwidth",
        "_flops",
        "_kv_bytes",
        "_latency_s",
        "_linear_flops",
        "_network_bandwidth",
        "_one_bound_each",
        "_prefill_overhead_s",
        "_step_overhead_s",
        "_weight_bytes",
    )

    def __init__(self, costs: RooflineCost):
        super().__init__(costs)
        hardware, shape = costs.hardware, costs.shape
        self._one_bound_each: bool = costs.one_bound_each
        self._flops: float = hardware.effective_flops
        self._bandwidth: float = hardware.effective_memory_bandwidth
        self._latency_s: float = hardware.network_latency_s
        self._network_bandwidth: float = hardware.network_bandwidth
        self._prefill_overhead_s: float = hardware.prefill_overhead_s
        self._step_overhead_s: float = hardware.step_overhead_s
        self._linear_flops: float = shape.linear_flops
        self._attention_flops: float = shape.attention_flops
        self._weight_bytes = float(shape.weight_bytes)  # below 2 ** 53 as exact
        self._kv_bytes = float(shape.kv_bytes_per_token)

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        if new_tokens <= 0:
            return 0.0
        attended = new_tokens * cached_tokens + new_tokens * new_tokens / 2
        seconds = (self._linear_flops * new_tokens + self._attention_flops * attended) / self._flops
        if not self._one_bound_each:
            read_s = (self._weight_bytes + (new_tokens + cached_tokens) * self._kv_bytes) / self._bandwidth
            if read_s > seconds:
                seconds = read_s
        return (self._prefill_overhead_s + seconds) * self.prefill_scale

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        if batch <= 0:
            return 0.0
        seconds = (self._weight_bytes + context_tokens * self._kv_bytes) / self._bandwidth
        if not self._one_bound_each:
            flops_s = (self._linear_flops * batch + self._attention_flops * context_tokens) / self._flops
            if flops_s > seconds:
                seconds = flops_s
        return (self._step_overhead_s + seconds) * self.decode_scale

    def transfer_s(self, num_bytes: int) -> float:
        return self._latency_s + num_bytes / self._network_bandwidth if num_bytes > 0 else 0.0


class QuickFitted(QuickCosts):
    """See FittedCost."""

    __slots__ = (
        "_bandwidth",
        "_base_s",
        "_latency_s",
        "_per_context_s",
        "_per_pair_s",
        "_per_sequence_s",
        "_per_square_s",
        "_per_token_s",
        "_step_base_s",
    )

    def __init__(self, costs: FittedCost):
        super().__init__(costs)
        prefill, decode = costs.prefill, costs.decode
        self._base_s: float = prefill.base_s
        self._per_token_s: float = prefill.per_token_s
        self._per_pair_s: float = prefill.per_pair_s
        self._per_square_s: float = prefill.per_square_s
        self._step_base_s: float = decode.base_s
        self._per_sequence_s: float = decode.per_sequence_s
        self._per_context_s: float = decode.per_context_token_s
        self._latency_s: float = costs.transfer_latency_s
        self._bandwidth: float = costs.transfer_bandwidth

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        if new_tokens <= 0:
            return 0.0
        per_token = self._per_token_s + self._per_pair_s * cached_tokens + self._per_square_s * new_tokens
        return (self._base_s + per_token * new_tokens) * self.prefill_scale

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        if batch <= 0:
            return 0.0
        seconds = self._step_base_s + self._per_sequence_s * batch + self._per_context_s * context_tokens
        return seconds * self.decode_scale

    def transfer_s(self, num_bytes: int) -> float:
        return self._latency_s + num_bytes / self._bandwidth if num_bytes > 0 else 0.0
