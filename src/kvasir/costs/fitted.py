"""Seconds from measurements: a few non-negative coefficients per phase, fitted on relative error."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from kvasir.core.errors import ConfigError
from kvasir.costs.model import Counts

Array = npt.NDArray[np.float64]


class PrefillSample(Struct, frozen=True):
    """A measured prefill of `new_tokens` on `cached_tokens`."""

    new_tokens: int
    cached_tokens: int
    seconds: float


class DecodeSample(Struct, frozen=True):
    """A measured decode step of `batch` sequences whose contexts sum to `context_tokens`."""

    batch: int
    context_tokens: int
    seconds: float


class PrefillFit(Struct, frozen=True):
    """base + per_token·n + per_pair·n·p + per_square·n²: n new tokens on p cached. Errors are |predicted / measured - 1|."""

    base_s: float
    per_token_s: float
    per_pair_s: float
    per_square_s: float
    error_p50: float = 0.0
    error_p90: float = 0.0
    num_samples: int = 0


class DecodeFit(Struct, frozen=True):
    """base + per_sequence·batch + per_context_token·context; reading the weights is in the base."""

    base_s: float
    per_sequence_s: float
    per_context_token_s: float
    error_p50: float = 0.0
    error_p90: float = 0.0
    num_samples: int = 0


class FittedCost(Struct, frozen=True, tag=True):
    """A CostModel of one measured engine; `to_json` and `from_json` keep it in a file."""

    prefill: PrefillFit
    decode: DecodeFit
    transfer_latency_s: float
    transfer_bandwidth: float

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        if new_tokens <= 0:
            return 0.0
        fit = self.prefill
        per_token = fit.per_token_s + fit.per_pair_s * cached_tokens + fit.per_square_s * new_tokens
        return fit.base_s + per_token * new_tokens

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        if batch <= 0:
            return 0.0
        return self.decode.base_s + self.decode.per_sequence_s * batch + self.decode.per_context_token_s * context_tokens

    def decode_steps_s(self, batch: Counts, context_tokens: Counts) -> Array:
        fit = self.decode
        seconds: Array = fit.base_s + fit.per_sequence_s * batch + fit.per_context_token_s * context_tokens
        return seconds

    def transfer_s(self, num_bytes: int) -> float:
        return self.transfer_latency_s + num_bytes / self.transfer_bandwidth if num_bytes > 0 else 0.0

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2)

    @staticmethod
    def from_json(raw: bytes) -> FittedCost:
        """Raises ConfigError for anything but a FittedCost."""
        try:
            return msgspec.json.decode(raw, type=FittedCost)
        except msgspec.DecodeError as error:
            raise ConfigError(f"not a fitted cost model: {error}; make one with `kvasir profile`") from error


def fit_prefill(samples: Sequence[PrefillSample]) -> PrefillFit:
    """Raises ConfigError for fewer samples than coefficients or a time that is not positive."""
    new = np.array([s.new_tokens for s in samples], dtype=np.float64)
    cached = np.array([s.cached_tokens for s in samples], dtype=np.float64)
    seconds = _times([s.seconds for s in samples], at_least=4)
    columns = np.stack([np.ones_like(new), new, new * cached, new * new], axis=1)
    fit = _fit_relative(columns, seconds)
    base, per_token, per_pair, per_square = (float(c) for c in fit)
    p50, p90 = _relative_errors(columns @ fit, seconds)
    return PrefillFit(base, per_token, per_pair, per_square, p50, p90, len(samples))


def fit_decode(samples: Sequence[DecodeSample]) -> DecodeFit:
    """Raises ConfigError for fewer samples than coefficients or a time that is not positive."""
    batch = np.array([s.batch for s in samples], dtype=np.float64)
    context = np.array([s.context_tokens for s in samples], dtype=np.float64)
    seconds = _times([s.seconds for s in samples], at_least=3)
    columns = np.stack([np.ones_like(batch), batch, context], axis=1)
    fit = _fit_relative(columns, seconds)
    base, per_sequence, per_context_token = (float(c) for c in fit)
    p50, p90 = _relative_errors(columns @ fit, seconds)
    return DecodeFit(base, per_sequence, per_context_token, p50, p90, len(samples))


def _times(seconds: list[float], *, at_least: int) -> Array:
    if len(seconds) < at_least:
        raise ConfigError(f"cannot fit {at_least} coefficients to {len(seconds)} samples; measure more sizes")
    if min(seconds) <= 0:
        raise ConfigError(f"measured seconds must be positive, got {min(seconds)}")
    return np.array(seconds, dtype=np.float64)


def _fit_relative(columns: Array, seconds: Array) -> Array:
    """Least squares of predicted / measured - 1, coefficients not negative, so that more work never costs less.

    With at most four coefficients the constrained optimum is found exactly: it is the unconstrained optimum of some
    subset of the columns, so try all subsets and keep the best whose coefficients are all positive.
    """
    rows = columns / seconds[:, None]
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0] = 1.0
    rows, ones = rows / scale, np.ones_like(seconds)
    best: Array = np.zeros(columns.shape[1])
    least = float("inf")
    indexes = range(columns.shape[1])
    for subset in chain.from_iterable(combinations(indexes, size) for size in range(1, len(indexes) + 1)):
        chosen = list(subset)
        solution, *_ = np.linalg.lstsq(rows[:, chosen], ones, rcond=None)
        residual = float(np.sum((rows[:, chosen] @ solution - ones) ** 2))
        if np.all(solution >= 0) and residual < least:
            best, least = np.zeros_like(best), residual
            best[chosen] = solution
    unscaled: Array = best / scale
    return unscaled


def _relative_errors(predicted: Array, seconds: Array) -> tuple[float, float]:
    error = np.abs(predicted / seconds - 1.0)
    return float(np.quantile(error, 0.5)), float(np.quantile(error, 0.9))
