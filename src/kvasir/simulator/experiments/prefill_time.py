"""Prefill GPU time per request, beside co-located serving (FAST'25, Fig. 8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvasir.scheduling.strategy import strategy
from kvasir.simulator.clusters.split import ELASTIC
from kvasir.simulator.experiments.experiment import Bed, Column, Experiment, Figure, Grid
from kvasir.simulator.experiments.plots import Axis, bars
from kvasir.simulator.experiments.tasks import Play, without_sharing
from kvasir.simulator.run import Run

SPEED = 0.5
"""Slow enough that no system refuses or queues: what is compared is work, not waiting."""

PAPER = {
    "mooncake": 1.0,
    "no cache": 1.56,
    "local prefix cache": 1.43,
    "local cache, round robin": 1.43,
    "chunked, no cache": 1.90,
}
"""vLLM, vLLM with prefix caching and vLLM with chunked prefill on the conversation trace, over Mooncake."""


def _tasks(bed: Bed) -> Mapping[str, Callable[[], Run]]:
    both = bed.cluster(ELASTIC)
    whole, chunked = strategy("colocated"), strategy("colocated-chunked")
    cacheless = without_sharing(bed.trace)
    return {
        "mooncake": Play(bed.trace, bed.cluster(), strategy("mooncake").with_parts(admission="off"), speed=SPEED),
        "no cache": Play(cacheless, both, whole, speed=SPEED),
        "local prefix cache": Play(bed.trace, both, whole, speed=SPEED),
        "local cache, round robin": Play(bed.trace, both, whole.with_parts(placement="round-robin"), speed=SPEED),
        "chunked, no cache": Play(cacheless, both, chunked, speed=SPEED),
        "chunked, local cache": Play(bed.trace, both, chunked, speed=SPEED),
    }


def _figure(bed: Bed, results: Mapping[str, Run]) -> Figure:
    names = list(results)
    seconds = [run.prefill_s_per_request for run in results.values()]
    base = results["mooncake"].prefill_s_per_request or 1.0
    ratio = {name: s / base for name, s in zip(names, seconds, strict=True)}
    paper = [PAPER.get(name) for name in names]
    return Figure(
        grids=(
            Grid(
                "",
                (
                    Column("system", names),
                    Column("prefill, s per request", seconds, "{:.2f}"),
                    Column("over mooncake", list(ratio.values()), "{:.2f}"),
                    Column("paper", paper, "{:.2f}"),
                    Column("hit rate", [run.hit_rate for run in results.values()], "{:.3f}"),
                ),
            ),
        ),
        plots={"Prefill time over Mooncake's": bars(names, list(ratio.values()), paper, Axis("over mooncake"))},
        deviation=(
            f"No cache costs {ratio['no cache']:.2f}x (paper 1.56x), chunks without cache {ratio['chunked, no cache']:.2f}x "
            "(1.90x). Chunks cost 10 ms of overhead for 512 tokens in our model; on the paper's engine smaller matrix "
            f"products come on top. A local cache costs {ratio['local prefix cache']:.2f}x behind a router that knows what "
            f"each node has, and {ratio['local cache, round robin']:.2f}x behind one that takes nodes in turn; the paper's "
            "1.43x is nearest to the second, though it does not say how requests reached its instances, and vLLM 0.5.1 kept "
            "prefixes in GPU memory only, where we give each node 3M tokens of DRAM."
        ),
    )


EXPERIMENT = Experiment(
    name="prefill-time",
    title="Prefill GPU time per request",
    paper="FAST'25 Fig. 8",
    setting=f"16 nodes, {SPEED:g}x the trace's speed, admission off. Without cache: the same trace, no block shared.",
    tasks=_tasks,
    figure=_figure,
)
