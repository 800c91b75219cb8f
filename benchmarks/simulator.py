"""How fast the simulator is: an hour of the paper's traffic, and larger clusters with as much traffic for each node.

    python -m benchmarks.simulator [--trace conversation_trace.jsonl] [--nodes 16 64 250 1000] [--json] [--out docs/results]

Each run has a process of its own, whose peak memory it is, the trace included. Seconds are CPU seconds of one core after
loading, of the trace the least of `--rounds`. The clusters of `--nodes` play a synthetic conversation once, 1,000 requests a
node at the trace's rate; 1,000 nodes take some 10 to 30 minutes and 8 GiB. How far a run is, is said on stderr every
half minute; a size that would last longer than `--limit` minutes, by the speed of the size before, is left out. `--out`
writes `simulator.md` and its plot.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from msgspec.structs import replace

from kvasir.cli.bench.markdown import standalone
from kvasir.cli.simulating import simulating
from kvasir.core.request import Slo
from kvasir.report.plots.draw import Draw
from kvasir.report.plots.svg import FAINT, SERIES, svg_of
from kvasir.scheduling.strategy import strategy
from kvasir.simulator import SimConfig, simulate
from kvasir.simulator.clusters.load import load_cluster
from kvasir.simulator.spec import ClusterSpec
from kvasir.workload.synthesis import conversation
from kvasir.workload.trace import Trace, read_trace

Size = TypeVar("Size")

POLICY = "kvasir"
TRACE_NODES = 16
REQUESTS_PER_NODE = 1000
PROGRESS_S = 30.0


@dataclass(frozen=True, slots=True)
class Speed:
    """One simulation: its size, CPU seconds, and the peak memory of its process in MiB."""

    trace: str
    nodes: int
    requests: int
    seconds: float
    requests_per_s: int
    peak_mib: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="the published conversation trace (default: a synthetic one of its size)")
    parser.add_argument("--nodes", type=int, nargs="*", default=[16, 64, 250, 1000], help="cluster sizes, the smallest first")
    parser.add_argument("--rounds", type=int, default=3, help="of the trace; larger clusters are played once")
    parser.add_argument("--limit", type=float, default=60.0, help="minutes that one run may last")
    parser.add_argument("--json", action="store_true", help="print nothing but JSON")
    parser.add_argument("--out", type=Path, help="a directory for simulator.md and its plot")
    arguments = parser.parse_args()
    rounds = [apart(play_trace, arguments.trace) for _ in range(arguments.rounds)]
    trace = min(rounds, key=lambda speed: speed.seconds)
    scaling: list[Speed] = []
    for nodes in arguments.nodes:
        minutes = scaling[-1].seconds / 60 * (nodes / scaling[-1].nodes) if scaling else 0.0
        if minutes > arguments.limit:
            print(f"{nodes} nodes: left out, they would take {minutes:.0f} minutes", file=sys.stderr, flush=True)
            break
        scaling.append(apart(play_synthetic, nodes))
    about = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "command": shlex.join(["python", "-m", "benchmarks.simulator", *[Path(word).name for word in sys.argv[1:]]]),
    }
    if arguments.out is not None:
        (arguments.out / "simulator-scaling.svg").write_text(standalone(svg_of("simulator-scaling", plot(scaling))))
        (arguments.out / "simulator.md").write_text(page(about, trace, scaling))
    if arguments.json:
        print(json.dumps(about | {"trace": asdict(trace), "scaling": [asdict(speed) for speed in scaling]}, indent=2))
    elif arguments.out is None:
        print(page(about, trace, scaling))


def apart(measure: Callable[[Size], Speed], size: Size) -> Speed:
    """In a process of its own, so that its peak of memory is the run's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, size).result()


def play_trace(path: Path | None) -> Speed:
    if path is None:
        return timed("synthetic", conversation(np.random.default_rng(0)), TRACE_NODES)
    return timed("conversation", read_trace(path.read_bytes().splitlines()), TRACE_NODES)


def play_synthetic(nodes: int) -> Speed:
    rng, rate = np.random.default_rng(0), nodes / TRACE_NODES
    return timed("synthetic", conversation(rng, num_requests=nodes * REQUESTS_PER_NODE, rate=rate), nodes)


def timed(name: str, trace: Trace, nodes: int) -> Speed:
    count, cluster, config = len(trace.requests), cluster_of(nodes), SimConfig(sample_s=0.0)
    with simulating():
        start_s = time.process_time()
        simulate(trace, cluster, strategy(POLICY), slo=Slo(), config=config, on_progress=Progress(nodes, count).tell)
        seconds = time.process_time() - start_s
    print(f"{nodes} nodes: {count:,} requests in {seconds:.1f} s", file=sys.stderr, flush=True)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return Speed(name, nodes, count, round(seconds, 2), round(count / seconds), peak_mib)


class Progress:
    """Says on stderr how far a run is."""

    def __init__(self, nodes: int, count: int):
        self._nodes = nodes
        self._count = count
        self._said_s = time.monotonic()

    def tell(self, ended: int) -> None:
        if time.monotonic() - self._said_s >= PROGRESS_S:
            self._said_s = time.monotonic()
            print(f"{self._nodes} nodes: {ended:,} of {self._count:,} requests", file=sys.stderr, flush=True)


def cluster_of(nodes: int) -> ClusterSpec:
    """`paper-16` with so many nodes, its roles in turn."""
    base = load_cluster("paper-16")
    kinds = base.instances
    return replace(
        base,
        nodes=tuple(replace(base.nodes[0], id=f"node{i:04}") for i in range(nodes)),
        instances=tuple(replace(kinds[i % len(kinds)], id=f"node{i:04}-0", node=f"node{i:04}") for i in range(nodes)),
    )


def plot(scaling: list[Speed]) -> Draw:
    """Seconds against requests, both logarithmic, beside a line of one slope through the first point."""

    def draw(axes: Axes) -> None:
        sizes, seconds = [speed.requests for speed in scaling], [speed.seconds for speed in scaling]
        linear = [seconds[0] * size / sizes[0] for size in sizes]
        axes.loglog(sizes, linear, color=FAINT, linestyle=":", label="linear")
        axes.loglog(sizes, seconds, color=SERIES[0], marker="o", markersize=4.5, label="measured")
        axes.set_xticks(sizes, [f"{speed.requests:,}\n{speed.nodes} nodes" for speed in scaling], minor=False)
        axes.set_xlabel("requests")
        axes.set_ylabel("CPU seconds")
        axes.legend()

    return draw


def page(about: dict[str, str], trace: Speed, scaling: list[Speed]) -> str:
    rows = [
        f"| {speed.trace} | {speed.nodes:,} | {speed.requests:,} | {speed.seconds:.2f} | {speed.requests_per_s:,} |"
        f" {speed.seconds / speed.requests * 1e6:.0f} | {speed.peak_mib:,} |"
        for speed in (trace, *scaling)
    ]
    return f"""\
# How fast the simulator is

Machine: {about["machine"]}; {about["date"]}. Policy `{POLICY}`, nodes like those of `paper-16`, {REQUESTS_PER_NODE:,} requests
each in synthetic traces. CPU seconds of one core after loading; memory is the peak of the process, the trace included.

| trace | nodes | requests | seconds | requests/s | us/request | peak MiB |
|---|---:|---:|---:|---:|---:|---:|
{os.linesep.join(rows)}

![CPU seconds against requests](simulator-scaling.svg)

    {about["command"]}
"""


if __name__ == "__main__":
    main()
