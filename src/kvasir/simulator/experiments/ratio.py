"""Effective requests by how many nodes prefill and how many decode (FAST'25, Fig. 15)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from kvasir.core.request import Slo
from kvasir.report.plots.svg import SERIES
from kvasir.scheduling.strategy import strategy
from kvasir.simulator.experiments.experiment import PAPER_SLO, Bed, Column, Experiment, Figure, Grid
from kvasir.simulator.experiments.plots import COLOUR, Axis, Curve, curves
from kvasir.simulator.experiments.tasks import Play, effective_share
from kvasir.simulator.run import Run
from kvasir.workload.trace import Trace

SPEED = 3.0
"""About what the best split can serve, so that the others show what they cannot."""

NUM_PREFILL = (4, 6, 8, 10, 12, 13, 14)
TTFTS_S = (10.0, 30.0)


def _tasks(bed: Bed) -> Mapping[str, Callable[[], Run]]:
    tasks = {}
    for ttft_s in TTFTS_S:
        slo = Slo(ttft_s, PAPER_SLO.tbt_s)
        for count in NUM_PREFILL:
            cluster = bed.cluster(_split(count))
            tasks[_key(count, ttft_s)] = Play(bed.trace, cluster, strategy("mooncake"), slo, SPEED)
        tasks[f"kvasir, {ttft_s:g} s"] = Play(bed.trace, bed.cluster(), strategy("kvasir"), slo, SPEED)
    return tasks


def _split(num_prefill: int) -> str:
    return f"{num_prefill}P{16 - num_prefill}D"


def _key(num_prefill: int, ttft_s: float) -> str:
    return f"{_split(num_prefill)}, {ttft_s:g} s"


def _figure(bed: Bed, results: Mapping[str, Run]) -> Figure:
    fixed = {t: [results[_key(count, t)] for count in NUM_PREFILL] for t in TTFTS_S}
    elastic = {t: results[f"kvasir, {t:g} s"] for t in TTFTS_S}
    tokens = {t: [run.attained.token_share for run in [*fixed[t], elastic[t]]] for t in TTFTS_S}
    requests = {t: [effective_share(run) for run in [*fixed[t], elastic[t]]] for t in TTFTS_S}
    per_answer = _tokens_per_answer_token(bed.trace)
    best = {t: _split(NUM_PREFILL[int(np.argmax(tokens[t][:-1]))]) for t in TTFTS_S}
    return Figure(
        grids=(
            Grid(
                f"Effective share at {SPEED:g}x the trace's speed, TBT 100 ms",
                (
                    Column("split", [*map(_split, NUM_PREFILL), "kvasir, elastic"]),
                    *(Column(f"TTFT {t:g} s: requests", requests[t], "{:.1%}") for t in TTFTS_S),
                    *(Column(f"TTFT {t:g} s: input tokens", tokens[t], "{:.1%}") for t in TTFTS_S),
                ),
            ),
        ),
        plots={
            f"Effective input tokens by split, {SPEED:g}x": curves(
                [
                    *(
                        Curve(f"mooncake, {t:g} s", NUM_PREFILL, tokens[t][:-1], colour)
                        for t, colour in zip(TTFTS_S, (SERIES[2], COLOUR["mooncake"]), strict=True)
                    ),
                    *(
                        Curve(f"kvasir, {t:g} s", NUM_PREFILL, tokens[t][-1:] * len(NUM_PREFILL), colour)
                        for t, colour in zip(TTFTS_S, (SERIES[3], COLOUR["kvasir"]), strict=True)
                    ),
                ],
                Axis("prefill nodes of 16"),
                Axis("effective input tokens", is_share=True, top=1.05),
            )
        },
        deviation=(
            f"By input tokens the best of these splits is {best[10.0]} at TTFT 10 s and {best[30.0]} at 30 s; the paper finds "
            "the best near 1:1 for its synthetic workload (its Fig. 15, TTFT 10 s and TBT 100 ms). Prompts of this trace are "
            f"{per_answer:.0f} times as long as answers, and in our model decoding is bound by memory alone, so that a node "
            "decodes for several that prefill; on the paper's engine decode steps were slower, which asks for more decode "
            "nodes. By requests the splits differ less, because what a short prefill pool refuses is mostly long. kvasir "
            f"starts from 8P8D, changes roles as it goes and has no ratio to choose: {tokens[10.0][-1]:.1%} and "
            f"{tokens[30.0][-1]:.1%} of the input tokens, for {max(tokens[10.0][:-1]):.1%} and {max(tokens[30.0][:-1]):.1%} "
            "by the best fixed splits. At 10 s it gains from pipelines: a long prompt is late on any single node."
        ),
    )


def _tokens_per_answer_token(trace: Trace) -> float:
    return sum(r.input_tokens for r in trace.requests) / sum(r.output_tokens for r in trace.requests)


EXPERIMENT = Experiment(
    name="ratio",
    title="Ratio of prefill to decode nodes",
    paper="FAST'25 Fig. 15",
    setting=f"16 nodes, {SPEED:g}x the trace's speed: above what 8P8D can serve, so that the split matters.",
    tasks=_tasks,
    figure=_figure,
)
