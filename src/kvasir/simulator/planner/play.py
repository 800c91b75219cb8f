"""From a `RunSpec` to a simulation and its figures."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

import msgspec
import numpy as np

from kvasir import simulator
from kvasir.core.request import Slo
from kvasir.report.slo import ScaledSlo, attainment_of
from kvasir.report.timeline import Status
from kvasir.scheduling.strategy import Strategy, strategy
from kvasir.simulator.clusters import with_split
from kvasir.simulator.config import SimConfig
from kvasir.simulator.faults import Fault, FaultKind
from kvasir.simulator.planner.facts import TraceFacts
from kvasir.simulator.planner.runs import Event, Figures, Layout, Part, RunSpec
from kvasir.simulator.run import Run
from kvasir.simulator.spec import ClusterSpec, InstanceSpec, NodeSpec
from kvasir.workload import scaling
from kvasir.workload.trace import Trace

SURGE_FROM, SURGE_TO, SURGE_SPEED = 0.4, 0.6, 2.0
"""Which part of the trace comes how much faster."""

FAULT_AT = 0.5
"""When in the trace the node dies."""

REQUESTS_PER_BIN, MOST_BINS, FEWEST_BINS = 50, 60, 4
"""Parts of a run over time: enough requests in each that one of them does not decide."""

_STRATEGIES = {
    Layout.ELASTIC: strategy("kvasir"),
    Layout.FIXED: strategy("kvasir").with_parts(roles="static"),
    Layout.COLOCATED: strategy("colocated"),
    Layout.CHUNKED: strategy("colocated-chunked"),
}


@dataclass(frozen=True, slots=True)
class Player:
    """Plays a trace to clusters of equal nodes. `base` has one node and one instance; `speed` makes the trace the target load.

    `ssd_bandwidth`: read and write, bytes per second, of the SSD of a node that has one.
    """

    trace: Trace
    facts: TraceFacts
    base: ClusterSpec
    slo: Slo | ScaledSlo
    speed: float
    ssd_bandwidth: tuple[float, float] = (0.0, 0.0)
    seed: int = 0

    def play(self, run: RunSpec) -> Figures:
        """Equal runs give equal figures. Raises what `simulate` raises."""
        cluster = self.cluster(run)
        trace = self.trace_of(run)
        faults, event_s = self._event(run, cluster, trace)
        result = simulator.simulate(
            trace,
            cluster,
            self.strategy(run),
            slo=self.slo,
            seed=self.seed,
            faults=faults,
            config=SimConfig(sample_s=0.0),
        )
        return _figures(result, trace, event_s)

    def cluster(self, run: RunSpec) -> ClusterSpec:
        """`run.nodes` copies of the base's node, with the run's memory and roles."""
        kv_bytes = self.base.kv_bytes_per_token
        read, write = self.ssd_bandwidth if run.ssd_bytes else (0.0, 0.0)
        node = msgspec.structs.replace(
            self.base.nodes[0],
            dram_tokens=run.dram_bytes // kv_bytes,
            ssd_tokens=run.ssd_bytes // kv_bytes,
            ssd_read_bandwidth=read,
            ssd_write_bandwidth=write,
        )
        nodes, instances = zip(*(self._numbered(node, number, run.nodes) for number in range(run.nodes)), strict=True)
        cluster = msgspec.structs.replace(self.base, nodes=nodes, instances=instances)
        return with_split(cluster, run.split)

    def trace_of(self, run: RunSpec) -> Trace:
        """The part, at the load, with the surge that the run names."""
        trace = self.trace
        if run.part is Part.QUIET:
            trace = scaling.window(trace, start_s=self.facts.quiet_start_s, duration_s=self.facts.quiet_s)
        if run.event is Event.SURGE:
            trace = _surging(trace)
        return scaling.speed(trace, self.speed * run.load)

    def strategy(self, run: RunSpec) -> Strategy:
        """The scheduler of the run's layout."""
        return _STRATEGIES[run.layout]

    def _numbered(self, node: NodeSpec, number: int, count: int) -> tuple[NodeSpec, InstanceSpec]:
        """With the ids that a cluster file's nodes get."""
        name = f"{number:0{len(str(count - 1))}d}"
        instance = msgspec.structs.replace(self.base.instances[0], id=f"i{name}", node=f"n{name}")
        return msgspec.structs.replace(node, id=f"n{name}"), instance

    def _event(self, run: RunSpec, cluster: ClusterSpec, trace: Trace) -> tuple[tuple[Fault, ...], float]:
        """The faults, and when to look for the recovery from."""
        start_s = trace.requests[0].arrival_s
        match run.event:
            case Event.NONE:
                return (), 0.0
            case Event.NODE_DIES:
                at_s = start_s + trace.span_s * FAULT_AT
                target = Random(self.seed).choice(sorted(node.id for node in cluster.nodes))
                return (Fault(at_s, FaultKind.NODE, target, math.inf),), at_s
            case Event.SURGE:
                before, surge = SURGE_FROM, (SURGE_TO - SURGE_FROM) / SURGE_SPEED
                whole = before + surge + 1.0 - SURGE_TO
                return (), start_s + trace.span_s * (before + surge) / whole


def _surging(trace: Trace) -> Trace:
    """Arrivals of the middle come faster, and all after them earlier."""
    start_s, span_s = trace.requests[0].arrival_s, trace.span_s
    from_s, to_s = start_s + span_s * SURGE_FROM, start_s + span_s * SURGE_TO

    def moved(at_s: float) -> float:
        inside_s = min(max(at_s - from_s, 0.0), to_s - from_s)
        return at_s - inside_s * (1.0 - 1.0 / SURGE_SPEED)

    return replace(trace, requests=tuple(replace(r, arrival_s=moved(r.arrival_s)) for r in trace.requests))


def _figures(run: Run, trace: Trace, event_s: float) -> Figures:
    records, attained = run.records, run.attained
    ok = records.is_(Status.OK)
    num_bins = min(max(len(trace.requests) // REQUESTS_PER_BIN, FEWEST_BINS), MOST_BINS)
    return Figures(
        requests=attained.num_requests,
        effective_requests=attained.request_share,
        effective_input_tokens=attained.token_share,
        rejected=int(records.is_(Status.REJECTED).sum()),
        failed=int(records.is_(Status.FAILED).sum()),
        hit_rate=run.hit_rate,
        prefill_s_per_request=run.prefill_s_per_request,
        ttft_p90_s=_p90(records.ttft_s[ok]),
        tbt_p90_s=_p90(records.tbt_s[ok]),
        event_s=event_s - trace.requests[0].arrival_s,
        bin_s=trace.span_s / num_bins,
        effective_over_time=tuple(_over_time(run, num_bins)),
    )


def _p90(seconds: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float | None:
    measured = seconds[~np.isnan(seconds)]
    return float(np.percentile(measured, 90)) if measured.size else None


def _over_time(run: Run, num_bins: int) -> list[float | None]:
    r = run.records
    edges = np.linspace(r.arrival_s[0], r.arrival_s[-1], num_bins + 1)[1:-1]
    bins = np.searchsorted(edges, r.arrival_s, side="right")
    shares: list[float | None] = []
    for number in range(num_bins):
        attained = attainment_of(
            is_offered=~r.is_(Status.ABORTED) & (bins == number),
            is_ok=r.is_(Status.OK),
            input_tokens=r.input_tokens,
            ttft_s=r.ttft_s,
            tbt_s=r.tbt_s,
            unloaded_prefill_s=r.unloaded_prefill_s,
            slo=run.slo,
        )
        shares.append(attained.request_share if attained.num_requests else None)
    return shares
