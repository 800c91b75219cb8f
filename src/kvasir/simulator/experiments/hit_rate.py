"""Hit rate of one shared cache against its capacity (FAST'25, Fig. 9), and by eviction policy (arXiv 2407.00079, Table 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvasir.pool.cost_aware import block_seconds
from kvasir.pool.policies import EVICTIONS
from kvasir.pool.replay import CacheReplay
from kvasir.report.plots.svg import INK, SERIES
from kvasir.simulator.experiments.experiment import Bed, Column, Experiment, Figure, Grid
from kvasir.simulator.experiments.plots import Axis, Curve, curves
from kvasir.simulator.spec import ClusterSpec
from kvasir.workload.cache_model import HitRate, hit_rates
from kvasir.workload.trace import Trace

NODE_BLOCKS = 5_860
"""The DRAM of one node of the paper: 3M tokens."""

CAPACITIES = (1_000, NODE_BLOCKS, 10_000, 30_000, 50_000, 100_000)
"""Blocks of 512 tokens; those of Table 1, and one node."""

PAPER_RATES: dict[str, tuple[float | None, ...]] = {
    "lru": (0.30, None, 0.40, 0.48, 0.50, 0.51, 0.51),
    "lfu": (0.30, None, 0.35, 0.43, 0.49, 0.51, 0.51),
    "length-aware": (0.30, None, 0.35, 0.42, 0.48, 0.50, 0.51),
    "cost-aware": (None,) * 7,
}
"""Table 1, on a trace that was not published; the last is unlimited."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The trace through one cache of each capacity, evicting by one policy."""

    trace: Trace
    cluster: ClusterSpec
    eviction: str

    def __call__(self) -> list[HitRate]:
        seconds = block_seconds(self.cluster.costs, self.trace.block_tokens)
        sizes = [*CAPACITIES, num_blocks(self.trace)]
        rates = hit_rates(
            self.trace.requests, sizes, lambda n: CacheReplay(n, EVICTIONS[self.eviction](seconds)), seconds=seconds
        )
        return [rates[size] for size in sizes]


def num_blocks(trace: Trace) -> int:
    """Distinct blocks: a cache that never evicts."""
    return len({block for request in trace.requests for block in request.hash_ids})


def _tasks(bed: Bed) -> Mapping[str, Callable[[], list[HitRate]]]:
    return {name: Replay(bed.trace, bed.cluster(), name) for name in EVICTIONS}


def _figure(bed: Bed, results: Mapping[str, list[HitRate]]) -> Figure:
    sizes = [*CAPACITIES, num_blocks(bed.trace)]
    names = ("blocks", [*map("{:,}".format, CAPACITIES), "unlimited"])
    tokens = [size * bed.trace.block_tokens / 1e6 for size in sizes]
    blocks = {name: [rate.blocks for rate in rates] for name, rates in results.items()}
    best = blocks["lru"][-1] or 1.0
    node, most = blocks["lru"][1] / best, blocks["lru"][-2] / best
    by_policy = [
        column
        for name in EVICTIONS
        for column in (Column(name, blocks[name], "{:.3f}"), Column("paper", PAPER_RATES[name], "{:.2f}"))
        if any(value is not None for value in column.values)
    ]
    lru_s, ours_s = (results[name][1].seconds for name in ("lru", "cost-aware"))
    gain = ours_s / lru_s - 1 if lru_s else 0.0
    papers = [name for name in EVICTIONS if PAPER_RATES[name][0] is not None]
    lru_leads = [size for i, size in enumerate(CAPACITIES) if all(blocks["lru"][i] >= blocks[name][i] for name in papers)]
    paper_share: list[str | None] = [None] * len(sizes)
    paper_share[1], paper_share[-2] = "0.41-0.75", "nearly 1"
    return Figure(
        grids=(
            Grid(
                "Capacity (LRU)",
                (
                    Column(*names),
                    Column("tokens", tokens, "{:.1f}M"),
                    Column("hit rate", blocks["lru"], "{:.3f}"),
                    Column("of unlimited", [rate / best for rate in blocks["lru"]], "{:.2f}"),
                    Column("paper, three traces", paper_share),
                ),
            ),
            Grid("Eviction: share of blocks found", (Column(*names), *by_policy)),
            Grid(
                "Eviction: share of prefill seconds saved",
                (Column(*names), *(Column(n, [r.seconds for r in rates], "{:.3f}") for n, rates in results.items())),
            ),
        ),
        plots={
            "Blocks found by capacity, one shared cache": curves(
                [
                    *(Curve(n, sizes, blocks[n], colour) for n, colour in zip(EVICTIONS, SERIES, strict=False)),
                    Curve(
                        "LRU in Table 1 (other trace)",
                        [s for s, p in zip(sizes[:-1], PAPER_RATES["lru"], strict=False) if p is not None],
                        [p for p in PAPER_RATES["lru"][:-1] if p is not None],
                        INK,
                        is_paper=True,
                    ),
                ],
                Axis("capacity, blocks of 512 tokens", is_log=True, ticks=(1e3, 3e3, 1e4, 3e4, 1e5)),
                Axis("hit rate", is_share=True),
            )
        },
        deviation=(
            f"One node's 3M tokens reach {node:.0%} of the unlimited hit rate here (paper: 41-75 % by trace), 51M tokens "
            f"{most:.0%} (paper: nearly all). The unlimited rate of this trace is {best:.3f}, the paper's Table 2 says 0.40. "
            "Table 1 was measured on a trace of Kimi that is not public, in which half of all blocks repeat; only orderings "
            "compare. Of its three policies LRU leads or ties there at every size, here at "
            f"{', '.join(map('{:,}'.format, lru_leads)) or 'none'}; in a cache far smaller than what is in use, LRU evicts a "
            "conversation before its next turn comes. Cost-aware eviction is ours: with the 3M tokens of one node it saves "
            f"{gain:.0%} more prefill seconds than LRU."
        ),
    )


EXPERIMENT = Experiment(
    name="hit-rate",
    title="Cache hit rate against capacity and eviction policy",
    paper="FAST'25 Fig. 9; arXiv Table 1",
    setting="The trace in order through one cache that all nodes share; only leading blocks of a prompt count as hits.",
    tasks=_tasks,
    figure=_figure,
)
