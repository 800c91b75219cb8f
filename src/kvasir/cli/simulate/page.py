"""The HTML page of a simulated run: its figures, plots and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvasir.cli.simulate.outcome import Outcome, rejections
from kvasir.core.request import Role
from kvasir.core.units import format_duration
from kvasir.report.html import Headline, Page, Plot, Table
from kvasir.report.plots.draw import distribution, over_time, shares_over_time, stacked
from kvasir.report.plots.svg import svg_of
from kvasir.report.slo import CAPACITY_SHARE, ScaledSlo
from kvasir.report.timeline import Status
from kvasir.simulator.samples import Sample

NUM_BINS = 60
"""Rates over time are means over this many parts of the trace."""

_NUM_REASONS = 5
_NUM_HOT = 4


def page_of(outcome: Outcome) -> Page:
    """Everything that the run says, in the order in which one asks."""
    return Page(
        title=f"{outcome.policy} on {outcome.cluster.name}, {outcome.speed:g}x",
        subtitle=f"{outcome.trace_name}: {len(outcome.records.arrival_s):,} requests simulated in {outcome.wall_s:.1f} s",
        headlines=tuple(_headlines(outcome)),
        notes=tuple(outcome.notes()),
        plots=tuple(_plots(outcome)),
        tables=tuple(_tables(outcome)),
        conditions=tuple(outcome.conditions()),
        command=outcome.command,
    )


def _headlines(outcome: Outcome) -> Iterator[Headline]:
    attained = outcome.attained
    needed = f"of requests; {CAPACITY_SHARE:.0%} needed"
    yield Headline("Effective", f"{attained.request_share:.1%}", needed, attained.request_share >= CAPACITY_SHARE)
    needed = f"of input tokens; {CAPACITY_SHARE:.0%} needed"
    yield Headline("Effective", f"{attained.token_share:.1%}", needed, attained.token_share >= CAPACITY_SHARE)
    if outcome.capacity is not None:
        yield Headline("Capacity", str(outcome.capacity), "highest speed that is served")
    for name, spread in (("TTFT", outcome.ttft_s), ("TBT", outcome.tbt_s)):
        yield Headline(f"{name}, median", _seconds(spread.p50), f"p99 {_seconds(spread.p99)}")
    yield Headline("Cache hit rate", f"{outcome.run.hit_rate:.1%}", "of full prompt blocks")
    yield Headline("Rejected", f"{outcome.num_rejected:,}", f"of {attained.num_requests:,} requests")


def _plots(outcome: Outcome) -> Iterator[Plot]:
    records, slo = outcome.records, outcome.slo
    done = records.is_(Status.OK)
    if isinstance(slo, ScaledSlo):
        ratio = records.ttft_s[done] / outcome.ttft_limits_s[done]
        draw = distribution(ratio, limit=1.0, unit="times its limit")
        yield Plot(
            "TTFT against each request's own limit", svg_of("ttft", draw), "Requests that finished, at or below each value."
        )
    else:
        draw = distribution(records.ttft_s[done], limit=slo.ttft_s, unit="s")
        yield Plot("Time to first token", svg_of("ttft", draw), "Requests that finished, at or below each value.")
    tbt_ms = records.tbt_s[done & ~np.isnan(records.tbt_s)] * 1e3
    yield Plot(
        "Time between tokens",
        svg_of("tbt", distribution(tbt_ms, limit=slo.tbt_s * 1e3, unit="ms")),
        "Mean of a request's longest 10 % of token gaps.",
    )
    yield from _load_plots(outcome.run.samples)
    yield from _rate_plots(outcome)


def _load_plots(samples: Sequence[Sample]) -> Iterator[Plot]:
    times = [s.at_s for s in samples]
    waits = {
        "mean of those that prefill": [
            _mean(v for v, role in zip(s.wait_s, s.roles, strict=True) if role.can_prefill) for s in samples
        ],
        "longest": [max(s.wait_s, default=0.0) for s in samples],
    }
    yield Plot(
        "Prefill load",
        svg_of("prefill", over_time(times, waits, unit="queued seconds")),
        "Predicted seconds of prefill queued.",
    )
    batches = {
        "mean of those that decode": [
            _mean(v for v, role in zip(s.decode_batch, s.roles, strict=True) if role.can_decode) for s in samples
        ],
        "largest": [float(max(s.decode_batch, default=0)) for s in samples],
    }
    yield Plot(
        "Decode load",
        svg_of("decode", over_time(times, batches, unit="sequences")),
        "Sequences decoding together in an instance.",
    )
    roles = {role.value: [float(s.roles.count(role)) for s in samples] for role in Role}
    yield Plot(
        "Roles", svg_of("roles", stacked(times, roles, unit="instances")), "Instances by role; one that is down keeps its last."
    )
    hot = {
        f"hottest {n}" if n > 1 else "hottest": [
            float(s.hot_replicas[n - 1]) if len(s.hot_replicas) >= n else 0.0 for s in samples
        ]
        for n in range(1, _NUM_HOT + 1)
    }
    yield Plot(
        "Replicas of hot blocks",
        svg_of("replicas", over_time(times, hot, unit="nodes")),
        "On how many nodes the most hit blocks are.",
    )


def _rate_plots(outcome: Outcome) -> Iterator[Plot]:
    """Means over parts of the trace, by time of arrival."""
    records = outcome.records
    edges = np.linspace(0.0, float(records.arrival_s.max()) + 1e-9, NUM_BINS + 1)
    times = ((edges[:-1] + edges[1:]) / 2).tolist()
    started = ~records.is_(Status.REJECTED)
    cached, prompts = (
        _binned(records.arrival_s[started], v[started], edges) for v in (records.cached_tokens, records.input_tokens)
    )
    hits = {"": np.divide(cached, prompts, out=np.zeros(NUM_BINS), where=prompts > 0).tolist()}
    yield Plot(
        "Cache hit rate",
        svg_of("hits", shares_over_time(times, hits)),
        "Cached share of admitted prompt tokens, by arrival.",
    )
    arrived = _binned(records.arrival_s, np.ones(len(records.arrival_s)), edges)
    lines: dict[str, list[float]] = {}
    for reason, _ in rejections(records)[:_NUM_REASONS]:
        of_reason = np.array([r == reason for r in records.reason]) & records.is_(Status.REJECTED)
        rejected = _binned(records.arrival_s[of_reason], np.ones(int(of_reason.sum())), edges)
        lines[reason] = np.divide(rejected, arrived, out=np.zeros(NUM_BINS), where=arrived > 0).tolist()
    yield Plot(
        "Rejections",
        svg_of("rejections", shares_over_time(times, lines)),
        "Share of arriving requests that is rejected, by reason.",
    )


def _tables(outcome: Outcome) -> Iterator[Table]:
    total = len(outcome.records.arrival_s)
    tokens = outcome.records.input_tokens
    reasons = np.array([r or "" for r in outcome.records.reason])
    rejected = outcome.records.is_(Status.REJECTED)
    rows = tuple(
        (reason, f"{count:,}", f"{count / total:.1%}", f"{tokens[rejected & (reasons == reason)].mean():,.0f}")
        for reason, count in rejections(outcome.records)
    )
    yield Table("Rejections by reason", ("reason", "requests", "share", "mean prompt"), rows, "Nothing was rejected.")
    spreads = (("TTFT", outcome.ttft_s), ("TBT", outcome.tbt_s))
    cells = tuple((name, *map(_seconds, (s.mean, s.p50, s.p90, s.p99))) for name, s in spreads)
    yield Table("Latencies of finished requests", ("", "mean", "p50", "p90", "p99"), cells)
    if outcome.capacity is not None:
        probes = sorted(outcome.capacity.probes, key=lambda p: p.speed)
        shares = tuple(
            (f"{p.speed:g}x", f"{p.attained.request_share:.1%}", f"{p.attained.token_share:.1%}", "yes" if p.passes else "no")
            for p in probes
        )
        yield Table("Search for the capacity", ("speed", "requests", "input tokens", "served"), shares)


def _binned(
    times: npt.NDArray[np.float64], weights: npt.NDArray[np.generic], edges: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    sums: npt.NDArray[np.float64] = np.histogram(times, bins=edges, weights=weights.astype(np.float64))[0]
    return sums


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_duration(value)
