"""A run in numbers: the metrics of `vllm bench serve` under their own names, and what SLOs, cache and admission add."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import msgspec
import numpy as np

from kvasir.core.request import Slo
from kvasir.report.slo import Attainment, ScaledSlo, attainment
from kvasir.report.timeline import RequestRecord, Status

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean, median, standard deviation and 99th percentile, in milliseconds; None where nothing was measured."""

    mean: float | None
    median: float | None
    std: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """Totals and latencies of a run. Tokens, throughputs and latencies are of completed requests only, as vLLM's are."""

    duration_s: float
    num_offered: int
    num_completed: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int | None
    latencies_ms: Mapping[str, Distribution]
    slo: Slo | ScaledSlo
    attained: Attainment
    rejections: Mapping[str, int]
    failures: Mapping[str, int]
    num_aborted: int

    @property
    def request_throughput(self) -> float:
        """Completed requests per second."""
        return self._per_second(self.num_completed)

    @property
    def request_goodput(self) -> float:
        """Effective requests per second."""
        return self._per_second(self.attained.num_effective)

    @property
    def output_throughput(self) -> float:
        """Generated tokens per second."""
        return self._per_second(self.output_tokens)

    @property
    def total_token_throughput(self) -> float:
        """Input and generated tokens per second."""
        return self._per_second(self.input_tokens + self.output_tokens)

    @property
    def cached_share(self) -> float | None:
        """Share of the input tokens that the server took from its cache; None where it did not say."""
        return None if self.cached_tokens is None or not self.input_tokens else self.cached_tokens / self.input_tokens

    def to_json(self) -> dict[str, Json]:
        """A flat object: the keys of `vllm bench serve --save-result`, then ours."""
        return self._vllm_json() | self._own_json()

    def _vllm_json(self) -> dict[str, Json]:
        result: dict[str, Json] = {
            "duration": self.duration_s,
            "completed": self.num_completed,
            "failed": sum(self.failures.values()),
            "total_input_tokens": self.input_tokens,
            "total_output_tokens": self.output_tokens,
            "request_throughput": self.request_throughput,
            "request_goodput": self.request_goodput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
        }
        for metric, spread in self.latencies_ms.items():
            for statistic, value in asdict(spread).items():
                result[f"{statistic}_{metric}_ms"] = value
        return result

    def _own_json(self) -> dict[str, Json]:
        return {
            "offered": self.num_offered,
            "effective": self.attained.num_effective,
            "effective_request_share": self.attained.request_share,
            "effective_input_token_share": self.attained.token_share,
            "within_capacity": self.attained.is_within_capacity,
            "slo": msgspec.to_builtins(self.slo),
            "total_cached_tokens": self.cached_tokens,
            "cached_token_share": self.cached_share,
            "rejected": sum(self.rejections.values()),
            "rejections": dict(self.rejections),
            "failures": dict(self.failures),
            "aborted": self.num_aborted,
        }

    def _per_second(self, amount: float) -> float:
        return amount / self.duration_s if self.duration_s > 0 else 0.0


def summarise(records: Iterable[RequestRecord], *, duration_s: float, slo: Slo | ScaledSlo) -> Summary:
    """The summary of a run that took `duration_s`, judged against `slo`."""
    everything = list(records)
    completed = [r for r in everything if r.status is Status.OK]
    cached = [r.cached_tokens for r in completed if r.cached_tokens is not None]
    return Summary(
        duration_s=duration_s,
        num_offered=len(everything),
        num_completed=len(completed),
        input_tokens=sum(r.input_tokens for r in completed),
        output_tokens=sum(r.output_tokens for r in completed),
        cached_tokens=sum(cached) if cached else None,
        latencies_ms=_latencies_ms(completed),
        slo=slo,
        attained=attainment(everything, slo),
        rejections=_reasons(everything, Status.REJECTED),
        failures=_reasons(everything, Status.FAILED),
        num_aborted=sum(r.status is Status.ABORTED for r in everything),
    )


def _latencies_ms(completed: Sequence[RequestRecord]) -> dict[str, Distribution]:
    return {
        "ttft": _distribution(r.ttft_s for r in completed),
        "tpot": _distribution(r.tpot_s for r in completed),
        "itl": _distribution(gap for r in completed for gap in r.gaps_s),
        "tbt": _distribution(r.tbt_s for r in completed),
        "e2el": _distribution(r.e2e_s for r in completed),
    }


def _distribution(seconds: Iterable[float | None]) -> Distribution:
    values = np.array([s for s in seconds if s is not None]) * 1e3
    if not values.size:
        return Distribution(None, None, None, None)
    mean, std = float(values.mean()), float(values.std())
    return Distribution(mean, float(np.median(values)), std, float(np.percentile(values, 99)))


def _reasons(records: Iterable[RequestRecord], status: Status) -> dict[str, int]:
    """Count by reason, most frequent first, ties by name."""
    counts = Counter(r.reason or "unknown" for r in records if r.status is status)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
