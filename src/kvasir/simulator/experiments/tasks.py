"""The units of work of experiments: one simulation, or the search of one capacity."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from msgspec import structs

from kvasir import simulator
from kvasir.core.request import Slo
from kvasir.costs.roofline import RooflineCost
from kvasir.report.slo import Attainment, ScaledSlo
from kvasir.report.timeline import Status
from kvasir.scheduling.strategy import Strategy
from kvasir.simulator.capacity import Capacity, find_capacity
from kvasir.simulator.config import SimConfig
from kvasir.simulator.experiments.experiment import PAPER_SLO
from kvasir.simulator.run import Run
from kvasir.simulator.spec import ClusterSpec
from kvasir.workload import scaling
from kvasir.workload.trace import Trace

_NO_SAMPLES = SimConfig(sample_s=0.0)


@dataclass(frozen=True, slots=True)
class Play:
    """One simulation of `trace`, played `speed` times as fast."""

    trace: Trace
    cluster: ClusterSpec
    strategy: Strategy
    slo: Slo | ScaledSlo = PAPER_SLO
    speed: float = 1.0
    config: SimConfig = _NO_SAMPLES

    def __call__(self) -> Run:
        trace = scaling.speed(self.trace, self.speed)
        return simulator.simulate(trace, self.cluster, self.strategy, slo=self.slo, config=self.config)


@dataclass(frozen=True, slots=True)
class Search:
    """The capacity of `play`, whatever its own speed."""

    play: Play
    resolution: float

    def __call__(self) -> Capacity:
        def evaluate(speed: float) -> Attainment:
            return replace(self.play, speed=speed)().attained

        return find_capacity(evaluate, resolution=self.resolution)


def mean_ttft_s(run: Run) -> float:
    """Of the requests that were answered; NaN if none was."""
    answered = run.records.ttft_s[run.records.is_(Status.OK)]
    return float(answered.mean()) if answered.size else float("nan")


def effective_share(run: Run, slo: Slo | None = None) -> float:
    """The share of effective requests, by the run's own objectives or by others."""
    return (run if slo is None else replace(run, slo=slo)).attained.request_share


def num_rejected(run: Run) -> int:
    return int(np.count_nonzero(run.records.is_(Status.REJECTED)))


def with_network(cluster: ClusterSpec, bytes_per_s: float) -> ClusterSpec:
    """Every node with this bandwidth in each direction, and a cost model that knows it."""
    assert isinstance(cluster.costs, RooflineCost), "the paper's cluster has no profile"
    nodes = tuple(structs.replace(node, network_bandwidth=bytes_per_s) for node in cluster.nodes)
    hardware = structs.replace(cluster.costs.hardware, network_bandwidth=bytes_per_s)
    return structs.replace(cluster, nodes=nodes, costs=structs.replace(cluster.costs, hardware=hardware))


def with_dram(cluster: ClusterSpec, tokens: int) -> ClusterSpec:
    """Every node with room for the KVCache of so many tokens in its DRAM."""
    nodes = tuple(structs.replace(node, dram_tokens=tokens) for node in cluster.nodes)
    return structs.replace(cluster, nodes=nodes)


def with_nodes(cluster: ClusterSpec, count: int) -> ClusterSpec:
    """Only the first `count` nodes and their instances."""
    nodes = cluster.nodes[:count]
    ids = {node.id for node in nodes}
    return structs.replace(cluster, nodes=nodes, instances=tuple(i for i in cluster.instances if i.node in ids))


def without_sharing(trace: Trace) -> Trace:
    """The same lengths and times, but no two prompts have a block in common: nothing that a cache could find."""
    next_id = 0
    requests = []
    for request in trace.requests:
        count = len(request.hash_ids)
        requests.append(replace(request, hash_ids=tuple(range(next_id, next_id + count))))
        next_id += count
    return replace(trace, requests=tuple(requests))
