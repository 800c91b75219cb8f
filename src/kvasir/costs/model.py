"""The one question that scheduling asks of a machine: how many seconds will it take?"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64] | npt.NDArray[np.float64]
"""Whole numbers."""


class CostModel(Protocol):
    """Predicted seconds on one instance, otherwise idle. Every answer grows with every argument and is never negative."""

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        """Computing `new_tokens` of a prompt whose first `cached_tokens` have their KV in place."""
        ...

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        """One token for each of `batch` sequences, whose contexts sum to `context_tokens`."""
        ...

    def decode_steps_s(self, batch: Counts, context_tokens: Counts) -> Seconds:
        """`decode_step_s` for many instances at once; every batch is at least 1."""
        ...

    def transfer_s(self, num_bytes: int) -> float:
        """Moving `num_bytes` of KV from one node to another."""
        ...
