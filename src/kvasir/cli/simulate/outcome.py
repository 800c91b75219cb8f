"""What a simulation hands back: figures from its records, as a table, JSON and request lines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import msgspec

from kvasir.core.request import Slo
from kvasir.core.units import format_duration
from kvasir.report.slo import Attainment, Bools, Floats, ScaledSlo, are_effective, ttft_limits_s
from kvasir.report.summary import Json
from kvasir.report.table import row, rule
from kvasir.report.timeline import Status
from kvasir.simulator.capacity import Capacity, Probe
from kvasir.simulator.clusters.split import split_of
from kvasir.simulator.planner.answer import count
from kvasir.simulator.records import Records
from kvasir.simulator.run import Run
from kvasir.simulator.spec import ClusterSpec
from kvasir.workload.trace import Trace


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds of the finished requests that have them; None if none has."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class Outcome:
    """A finished simulation and its conditions. `wall_s` is the simulation's own time, without reading files."""

    run: Run
    trace: Trace
    trace_name: str
    cluster: ClusterSpec
    policy: str
    slo: Slo | ScaledSlo
    speed: float
    seed: int
    wall_s: float
    num_faults: int = 0
    capacity: Capacity | None = None
    command: str = ""

    @property
    def records(self) -> Records:
        return self.run.records

    @cached_property
    def ttft_limits_s(self) -> Floats:
        """The TTFT that each request may take."""
        return ttft_limits_s(self.records.unloaded_prefill_s, self.slo)

    @property
    def _is_effective(self) -> Bools:
        r = self.records
        return are_effective(
            is_ok=r.is_(Status.OK), ttft_s=r.ttft_s, tbt_s=r.tbt_s, ttft_limits_s=self.ttft_limits_s, slo=self.slo
        )

    @property
    def attained(self) -> Attainment:
        return self.run.attained

    @cached_property
    def summary(self) -> dict[str, Json]:
        """The run's own JSON."""
        return self.run.to_json()

    @property
    def ttft_s(self) -> Spread:
        return msgspec.convert(self.summary["ttft_s"], Spread)

    @property
    def tbt_s(self) -> Spread:
        return msgspec.convert(self.summary["tbt_s"], Spread)

    @property
    def num_rejected(self) -> int:
        return int(self.records.is_(Status.REJECTED).sum())

    @property
    def num_failed(self) -> int:
        return int(self.records.is_(Status.FAILED).sum())

    def to_json(self) -> dict[str, Json]:
        """One object: the run's own keys, and the conditions under which it was made."""
        result = self.summary | {
            "split": split_of(self.cluster),
            "speed": self.speed,
            "wall_s": self.wall_s,
            "trace": self.trace_name,
            "trace_span_s": self.trace.span_s,
            "unknown": list(self.trace.unknown),
            "faults": self.num_faults,
        }
        if self.capacity is not None:
            result["capacity_speed"] = self.capacity.speed
            result["capacity_is_bound"] = self.capacity.is_bound
            result["probes"] = [_probe_json(probe) for probe in self.capacity.probes]
        return result

    def table(self) -> str:
        """For people: effective shares first, then latencies, cache, rejections and the conditions."""
        lines = [rule(f" {self.policy} on {self.cluster.name}, {self.speed:g}x ", "=")]
        lines += self._totals()
        lines.append(rule("Latencies of finished requests"))
        for name, spread in (("TTFT", self.ttft_s), ("TBT", self.tbt_s)):
            lines.append(row(f"{name} mean / median", f"{_s(spread.mean)} / {_s(spread.p50)}"))
            lines.append(row(f"{name} p90 / p99", f"{_s(spread.p90)} / {_s(spread.p99)}"))
        lines.append(rule("Conditions"))
        lines += [row(name, value) for name, value in self.conditions()]
        if self.capacity is not None:
            lines += _capacity_lines(self.capacity)
        lines.append(rule("", "="))
        return "\n".join(lines)

    def _totals(self) -> Iterator[str]:
        yield row("Requests", self.attained.num_requests)
        yield row("Effective requests (%)", self.attained.request_share * 100)
        yield row("Effective input tokens (%)", self.attained.token_share * 100)
        yield row("Cache hit rate (%)", self.run.hit_rate * 100)
        yield row("Prefill per request (s)", self.run.prefill_s_per_request)
        yield row("Rejected requests", self.num_rejected)
        yield from (row(f"  {reason}", count) for reason, count in rejections(self.records))
        if self.num_failed:
            yield row("Failed requests", self.num_failed)

    def conditions(self) -> Iterator[tuple[str, str]]:
        """What the figures depend on."""
        yield "Trace", f"{self.trace_name}, {self.trace.span_s:,.0f} s at {self.speed:g}x"
        yield "Cluster", f"{self.cluster.name}, {len(self.cluster.nodes)} nodes, {split_of(self.cluster)}"
        yield "SLO", slo_text(self.slo)
        yield "Policy", self.policy
        yield "Seed", str(self.seed)
        if self.num_faults:
            yield "Faults", str(self.num_faults)
        yield "Simulated in", format_duration(self.wall_s)

    def notes(self) -> Iterator[str]:
        """What the reader of the figures must know."""
        yield from trace_notes(self.trace)

    def request_lines(self) -> Iterator[bytes]:
        """One JSON object a request, in order of arrival; what was not measured is null."""
        r = self.records
        columns = zip(
            r.arrival_s.tolist(),
            r.input_tokens.tolist(),
            r.output_tokens.tolist(),
            r.cached_tokens.tolist(),
            r.ttft_s.tolist(),
            r.tbt_s.tolist(),
            r.end_s.tolist(),
            r.status.tolist(),
            r.reason,
            self._is_effective.tolist(),
            strict=True,
        )
        for number, (arrival, prompt, output, cached, ttft, tbt, end, status, reason, effective) in enumerate(columns):
            line = {
                "id": f"r{number}",
                "arrival_s": arrival,
                "input_tokens": prompt,
                "output_tokens": output,
                "cached_tokens": cached,
                "ttft_s": _or_none(ttft),
                "tbt_s": _or_none(tbt),
                "end_s": _or_none(end),
                "status": r.statuses[status].value,
                "reason": reason,
                "effective": effective,
            }
            yield msgspec.json.encode(line) + b"\n"


def rejections(records: Records) -> list[tuple[str, int]]:
    """Count by reason, most frequent first, ties by name."""
    rejected = records.is_(Status.REJECTED).tolist()
    counts = Counter(reason or "unknown" for reason, is_rejected in zip(records.reason, rejected, strict=True) if is_rejected)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def trace_notes(trace: Trace) -> Iterator[str]:
    """What was repaired in the trace, and what it does not say."""
    if trace.num_unsorted:
        yield f"{count(trace.num_unsorted, 'request')} came out of order; sorted by timestamp"
    if trace.num_dropped:
        yield f"{count(trace.num_dropped, 'record')} dropped: failures, or turns without an answer"
    yield from (f"not in the trace: {text}" for text in trace.unknown)


def slo_text(slo: Slo | ScaledSlo) -> str:
    if isinstance(slo, Slo):
        return f"TTFT {slo.ttft_s:g} s, TBT {slo.tbt_s * 1e3:g} ms"
    return f"TTFT max({slo.ttft_floor_s:g} s, {slo.ttft_factor:g}x unloaded prefill), TBT {slo.tbt_s * 1e3:g} ms"


def _capacity_lines(capacity: Capacity) -> Iterator[str]:
    yield rule("Capacity")
    for probe in sorted(capacity.probes, key=lambda p: p.speed):
        shares = f"{probe.attained.request_share:.1%} / {probe.attained.token_share:.1%}"
        yield row(f"  {probe.speed:g}x: requests / tokens", f"{shares} {'ok' if probe.passes else ''}".rstrip())
    yield row("Capacity (x the trace's own speed)", str(capacity))


def _probe_json(probe: Probe) -> dict[str, Json]:
    shares = {"effective": probe.attained.request_share, "effective_input_tokens": probe.attained.token_share}
    return {"speed": probe.speed, **shares, "passes": probe.passes}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _s(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(seconds)
