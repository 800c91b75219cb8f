"""Replicas of hot blocks over time (FAST'25, Fig. 11)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from kvasir.report.plots.draw import over_time
from kvasir.scheduling.strategy import strategy
from kvasir.simulator.config import SimConfig
from kvasir.simulator.experiments.experiment import Bed, Column, Experiment, Figure, Grid
from kvasir.simulator.experiments.tasks import Play
from kvasir.simulator.run import Run

RANKS = (0, 10, 100, 1_000, 10_000)
"""Bounds of the groups of blocks, by hits; the paper draws the blocks at these ranks, of which many have equal hits here."""

POLICIES = ("mooncake", "kvasir")
_SAMPLED = SimConfig(sample_s=30.0, num_hot=max(RANKS))


def _tasks(bed: Bed) -> Mapping[str, Callable[[], Run]]:
    return {name: Play(bed.trace, bed.cluster(), strategy(name), config=_SAMPLED) for name in POLICIES}


def _figure(bed: Bed, results: Mapping[str, Run]) -> Figure:
    groups = {f"{low + 1:,}-{high:,}": (low, high) for low, high in pairwise(RANKS)}
    lines = {
        name: {title: [_mean(s.hot_replicas[low:high]) for s in run.samples] for title, (low, high) in groups.items()}
        for name, run in results.items()
    }
    times = {name: [sample.at_s for sample in run.samples] for name, run in results.items()}
    late = {name: {t: _mean(v[len(v) // 2 :]) for t, v in by_group.items()} for name, by_group in lines.items()}
    uses = sorted(Counter(block for r in bed.trace.requests for block in r.hash_ids).values(), reverse=True)
    return Figure(
        grids=(
            Grid(
                "Mean replicas in the second half of the trace",
                (
                    Column("blocks of rank", list(groups)),
                    *(Column(name, list(of_name.values()), "{:.1f}") for name, of_name in late.items()),
                    Column("paper", ["almost every prefill node", "almost every prefill node", None, None]),
                ),
            ),
        ),
        plots={
            f"Nodes that hold a block, by its rank: {name}": over_time(times[name], lines[name], unit="nodes")
            for name in POLICIES
        },
        deviation=(
            f"In the second half of the trace a block of the first ten is on {late['mooncake']['1-10']:.1f} nodes under "
            f"Algorithm 1 and on {late['kvasir']['1-10']:.1f} under kvasir, one of the next ninety on "
            f"{late['mooncake']['11-100']:.1f} and {late['kvasir']['11-100']:.1f}; the paper's first hundred are on almost "
            f"every prefill node. This trace has less to replicate: its most used block is in {uses[0]:,} of "
            f"{len(bed.trace.requests):,} requests, the hundredth in {uses[min(99, len(uses) - 1)]:,}, all of one "
            "conversation, and when that has ended its copies are evicted. Hits are counted up to the moment drawn, in the "
            "paper over the whole run. Under kvasir decode nodes prefill too, so up to 16 nodes can have a block."
        ),
    )


def _mean(values: Sequence[float]) -> float:
    """0 while no block of the group was hit."""
    return sum(values) / len(values) if values else 0.0


EXPERIMENT = Experiment(
    name="replicas",
    title="Replicas of hot blocks over time",
    paper="FAST'25 Fig. 11",
    setting="8P8D, the trace's own speed, a sample every 30 s.",
    tasks=_tasks,
    figure=_figure,
)
