"""Which requests met their latency objectives, and the capacity that follows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvasir.core.errors import ConfigError
from kvasir.core.request import Slo
from kvasir.report.timeline import RequestRecord, Status

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
    return max(slo.ttft_floor_s, slo.ttft_factor * record.unloaded_prefill_s)


def is_effective(record: RequestRecord, slo: Slo | ScaledSlo) -> bool:
    """Whether the request finished and met both its TTFT and its TBT."""
    if record.status is not Status.OK or record.ttft_s is None:
        return False
    tbt_s = record.tbt_s
    return record.ttft_s <= ttft_limit_s(record, slo) and (tbt_s is None or tbt_s <= slo.tbt_s)


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


def capacity(by_rate: Mapping[float, Attainment]) -> float | None:
    """The highest measured rate (a multiple of the trace's own) within capacity; None if none is."""
    return max((rate for rate, reached in by_rate.items() if reached.is_within_capacity), default=None)
