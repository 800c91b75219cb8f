"""Predicted seconds brought to what an engine really takes, while it serves: no profile fits for ever, and many have none."""

from __future__ import annotations

import math
from typing import Final

from kvasir.costs.quick import QuickCosts

MEMORY_S: Final = 5.0
"""Measured seconds over which a step fades: a machine that changes its speed is followed within as much."""

TRUST_S: Final = 0.002
"""The model's own word counts as so many measured seconds."""

OUTLIER: Final = 4.0
"""A step counts as at most so many times what was expected of it: one that stood still says nothing of the next."""

MOST: Final = 64.0
"""No engine is further than this from its model, either way: beyond it something else was measured."""


class Calibration:
    """Keeps the scales of `costs` at what the measured steps say: least squares of seconds = a · prefill + b · decode.

    Each step weighs as much as it took, its error relative to what was predicted; steps of one phase alone so give the mean of
    measured over predicted.
    """

    __slots__ = ("_both", "_costs", "_decode", "_decode_seen", "_prefill", "_prefill_seen")

    def __init__(self, costs: QuickCosts):
        self._costs = costs
        self._prefill = self._both = self._decode = 0.0  # the sums of the normal equations: their matrix,
        self._prefill_seen = self._decode_seen = 0.0  # and their right side

    @property
    def prefill_scale(self) -> float | None:
        """Measured over predicted seconds; None before the first."""
        return round(self._costs.prefill_scale, 2) if self._prefill else None

    @property
    def decode_scale(self) -> float | None:
        return round(self._costs.decode_scale, 2) if self._decode else None

    def saw(self, prefill_s: float, decode_s: float, seconds: float) -> None:
        """A step took `seconds`; the scaled costs said `prefill_s` for its chunks and `decode_s` for its decode batch."""
        expected_s = prefill_s + decode_s
        prefill, decode = prefill_s / self._costs.prefill_scale, decode_s / self._costs.decode_scale
        predicted_s = prefill + decode
        if not predicted_s > 0.0 or not 0.0 < seconds < math.inf:
            return
        seconds = min(max(seconds, expected_s / OUTLIER), expected_s * OUTLIER)
        prefill, decode, ratio = prefill / predicted_s, decode / predicted_s, seconds / predicted_s
        keep = math.exp(-seconds / MEMORY_S)
        self._prefill = keep * self._prefill + seconds * prefill * prefill
        self._both = keep * self._both + seconds * prefill * decode
        self._decode = keep * self._decode + seconds * decode * decode
        self._prefill_seen = keep * self._prefill_seen + seconds * prefill * ratio
        self._decode_seen = keep * self._decode_seen + seconds * decode * ratio
        self._costs.scale(*self._solution())

    def _solution(self) -> tuple[float, float]:
        """Drawn to 1 by TRUST_S, so that there is always one."""
        prefill, both, decode = self._prefill + TRUST_S, self._both, self._decode + TRUST_S
        prefill_seen, decode_seen = self._prefill_seen + TRUST_S, self._decode_seen + TRUST_S
        determinant = prefill * decode - both * both
        return (
            _within((prefill_seen * decode - decode_seen * both) / determinant),
            _within((decode_seen * prefill - prefill_seen * both) / determinant),
        )


def _within(scale: float) -> float:
    return min(max(scale, 1.0 / MOST), MOST)
