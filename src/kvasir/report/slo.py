"""Which requests met their latency objectives, and the capacity that follows."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvasir.core.errors import ConfigError
from kvasir.core.request import Slo
from kvasir.report.timeline import RequestRecord, Status

Bools: TypeAlias = npt.NDArray[np.bool_]
Floats: TypeAlias = npt.NDArray[np.float64]
Number: TypeAlias = float | Floats

CAPACITY_SHARE = 0.9
"""Share of requests, and of input tokens, that must be effective for a rate to count as served (docs/vocabulary)."""


@dataclass(frozen=True, slots=True)
class ScaledSlo:
    """TTFT within max(`ttft_floor_s`, `ttft_factor` x the request's own unloaded, uncached prefill seconds)."""

    ttft_floor_s: float = 2.0
    ttft_factor: float = 5.0
    tbt_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Attainment:
    """How much of the offered work was effective. Rejected and failed requests were offered; aborted ones are left out."""

    num_requests: int
    num_effective: int
    input_tokens: int
    effective_input_tokens: int

    @property
    def request_share(self) -> float:
        """Effective request capacity: the share of effective requests. Nothing offered: 0.0."""
        return self.num_effective / self.num_requests if self.num_requests else 0.0

    @property
    def token_share(self) -> float:
        """Share of the input tokens that belong to effective requests. Nothing offered: 0.0."""
        return self.effective_input_tokens / self.input_tokens if self.input_tokens else 0.0

    @property
    def is_within_capacity(self) -> bool:
        """At least 90 % of the requests *and* of the input tokens: shedding the few longest prompts does not pass."""
        return self.request_share >= CAPACITY_SHARE and self.token_share >= CAPACITY_SHARE


def ttft_limit_s(record: RequestRecord, slo: Slo | ScaledSlo) -> float:
    """The TTFT that this request may take. Raises ConfigError for a scaled SLO without a prefill prediction."""
    if isinstance(slo, Slo):
        return slo.ttft_s
    if record.unloaded_prefill_s is None:
        raise ConfigError(f"scaled SLO: request {record.id} has no unloaded_prefill_s; give a cost model or use a flat SLO")
    return scaled_limit_s(record.unloaded_prefill_s, slo)


def scaled_limit_s(unloaded_prefill_s: float, slo: ScaledSlo) -> float:
    """The TTFT that a request of so many unloaded, uncached prefill seconds may take."""
    return float(_limit_s(unloaded_prefill_s, slo))


def is_effective(record: RequestRecord, slo: Slo | ScaledSlo) -> bool:
    """Whether the request finished and met both its TTFT and its TBT."""
    if record.status is not Status.OK or record.ttft_s is None:
        return False
    tbt_s = math.nan if record.tbt_s is None else record.tbt_s
    return bool(_meets(record.ttft_s, tbt_s, ttft_limit_s(record, slo), slo.tbt_s))


def ttft_limits_s(unloaded_prefill_s: Floats, slo: Slo | ScaledSlo) -> Floats:
    """As `ttft_limit_s`, of a column."""
    return np.broadcast_to(_limit_s(unloaded_prefill_s, slo), unloaded_prefill_s.shape)


def are_effective(*, is_ok: Bools, ttft_s: Floats, tbt_s: Floats, ttft_limits_s: Floats, slo: Slo | ScaledSlo) -> Bools:
    """As `is_effective`, of columns; what was not measured is NaN."""
    result: Bools = is_ok & _meets(ttft_s, tbt_s, ttft_limits_s, slo.tbt_s)
    return result


def attainment(records: Iterable[RequestRecord], slo: Slo | ScaledSlo) -> Attainment:
    """Effective requests and input tokens against those offered."""
    offered = [r for r in records if r.status is not Status.ABORTED]
    effective = [r for r in offered if is_effective(r, slo)]
    return Attainment(
        num_requests=len(offered),
        num_effective=len(effective),
        input_tokens=sum(r.input_tokens for r in offered),
        effective_input_tokens=sum(r.input_tokens for r in effective),
    )


def attainment_of(
    *,
    is_offered: Bools,
    is_ok: Bools,
    input_tokens: npt.NDArray[np.int64],
    ttft_s: Floats,
    tbt_s: Floats,
    unloaded_prefill_s: Floats,
    slo: Slo | ScaledSlo,
) -> Attainment:
    """As `attainment`, of columns; what was not measured is NaN."""
    limits_s = ttft_limits_s(unloaded_prefill_s, slo)
    effective = is_offered & are_effective(is_ok=is_ok, ttft_s=ttft_s, tbt_s=tbt_s, ttft_limits_s=limits_s, slo=slo)
    return Attainment(
        num_requests=int(is_offered.sum()),
        num_effective=int(effective.sum()),
        input_tokens=int(input_tokens[is_offered].sum()),
        effective_input_tokens=int(input_tokens[effective].sum()),
    )


def capacity(by_rate: Mapping[float, Attainment]) -> float | None:
    """The highest measured rate (a multiple of the trace's own) within capacity; None if none is."""
    return max((rate for rate, reached in by_rate.items() if reached.is_within_capacity), default=None)


def _limit_s(unloaded_prefill_s: Number, slo: Slo | ScaledSlo) -> Number:
    if isinstance(slo, Slo):
        return slo.ttft_s
    limit_s: Number = np.maximum(slo.ttft_floor_s, slo.ttft_factor * unloaded_prefill_s)
    return limit_s


def _meets(ttft_s: Number, tbt_s: Number, ttft_limit_s: Number, tbt_limit_s: float) -> Any:
    """One token has no TBT (NaN) to miss; without a first token nothing is met. For one request or for columns."""
    return (ttft_s <= ttft_limit_s) & ~(np.greater(tbt_s, tbt_limit_s))
