"""The `kvasir simulate` command: flags in; a table, JSON and a page out."""

from __future__ import annotations

import random
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvasir import simulator
from kvasir.cli.files import check_writable, write
from kvasir.cli.simulate.inputs import duration, faults_for, find_cluster, load_trace, objectives
from kvasir.cli.simulate.outcome import Outcome, trace_notes
from kvasir.cli.simulate.progress import Show, shown
from kvasir.cli.simulating import simulating
from kvasir.core.errors import ConfigError
from kvasir.core.request import Slo
from kvasir.report.slo import Attainment, ScaledSlo
from kvasir.scheduling.strategy import Strategy, strategy
from kvasir.simulator.capacity import Capacity, find_capacity
from kvasir.simulator.clusters.split import ELASTIC
from kvasir.simulator.config import SimConfig
from kvasir.simulator.faults import Fault
from kvasir.simulator.planner.facts import unknown_times
from kvasir.simulator.run import Run
from kvasir.simulator.spec import ClusterSpec
from kvasir.workload import scaling
from kvasir.workload.trace import Trace

_NO_SAMPLES = SimConfig(sample_s=0.0)
_NUM_SAMPLES = 240
"""How often the state is sampled for the page's plots, over the whole trace."""


def simulate(
    trace: Annotated[
        str,
        typer.Argument(
            help="Mooncake JSONL, Azure or BurstGPT CSV, ShareGPT JSON, or synthetic:conversation[?seed=3&requests=200]."
        ),
    ],
    cluster: Annotated[str, typer.Option(help="A TOML file, or paper-16, h800-16, h200-8, laptop.")] = "paper-16",
    policy: Annotated[str, typer.Option(help="Scheduler: kvasir, or a baseline.")] = "kvasir",
    speed: Annotated[float, typer.Option(help="How many times as fast requests arrive.")] = 1.0,
    slo_ttft: Annotated[
        str, typer.Option(help="Longest time to first token, or scaled: max(2 s, 5x unloaded prefill).")
    ] = "30s",
    slo_tbt: Annotated[str, typer.Option(help="Longest mean of a request's longest 10 % of token gaps.")] = "100ms",
    split: Annotated[str | None, typer.Option(help="Other roles than the file's: 8P8D, 4P4D8M, elastic (all mixed).")] = None,
    jitter: Annotated[str, typer.Option(help="Move each arrival later by up to this, at random.")] = "0s",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Only the first N requests.")] = None,
    capacity: Annotated[
        bool, typer.Option("--capacity", help="Search the highest speed that is served; ignores --speed.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.")] = None,
    save_requests: Annotated[Path | None, typer.Option(help="Write every request's figures, JSONL.")] = None,
    faults: Annotated[str | None, typer.Option(help="A TOML file of [[fault]] tables, or a seed for some at random.")] = None,
    admission: Annotated[str | None, typer.Option(help="Replace the policy's admission rule.")] = None,
    order: Annotated[str | None, typer.Option(help="Replace its queue order.")] = None,
    eviction: Annotated[str | None, typer.Option(help="Replace its eviction.")] = None,
    roles: Annotated[str | None, typer.Option(help="Replace how it changes roles.")] = None,
    decode: Annotated[str | None, typer.Option(help="Replace its choice of decode instance.")] = None,
    replication: Annotated[str | None, typer.Option(help="Replace its replication of hot blocks.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second, for traces without times (ShareGPT). [default: 1]")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Checkpoint directory whose tokenizer counts ShareGPT's tokens.")
    ] = None,
) -> None:
    """Play a trace to the scheduler in virtual time, on a cluster that need not exist, and say how many requests met
    their latency objectives.

    The scheduler is the one of `kvasir serve`, the same objects; only time is predicted. An hour of the paper's traffic on
    16 nodes:

        kvasir simulate conversation_trace.jsonl --cluster paper-16

    Your own trace on your own cluster, with a page to look at, then how much it can take:

        kvasir simulate trace.csv --cluster cluster.toml --html report.html

        kvasir simulate trace.csv --cluster cluster.toml --capacity

    Another split, objective or policy, one part of a policy replaced, some nodes dying:

        kvasir simulate synthetic:conversation --split 12P4D --slo-ttft scaled --policy mooncake --admission off

        kvasir simulate synthetic:conversation --faults 7
    """
    check_writable(html, save_requests, reads=(trace, cluster, faults))
    scheduler = strategy(policy).with_parts(
        admission=admission,
        order=order,
        eviction=eviction,
        roles=roles or ("static" if split is not None else None),
        decode=decode,
        replication=replication,
    )
    plan = _Plan(
        strategy=scheduler,
        cluster=find_cluster(cluster, split if split is not None else ELASTIC if scheduler.is_colocated else None),
        slo=objectives(slo_ttft, slo_tbt),
        seed=seed,
        fault_source=faults,
        with_samples=html is not None,
        trace=_prepared(_load(trace, rate, seed, tokenizer), limit, duration("--jitter", jitter), seed),
    )
    found = plan.capacity() if capacity else None
    chosen = (found.speed or speed) if found is not None else speed
    run, wall_s = plan.run(chosen)
    played = scaling.speed(plan.trace, chosen)
    outcome = Outcome(
        run=run,
        trace=played,
        trace_name=Path(trace).name,
        cluster=plan.cluster,
        policy=policy,
        slo=plan.slo,
        speed=chosen,
        seed=seed,
        wall_s=wall_s,
        num_faults=len(plan.faults(played)),
        capacity=found,
        command=shlex.join(["kvasir", *sys.argv[1:]]),
    )
    _write(outcome, as_json=json, html=html, save_requests=save_requests)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The flags, resolved; one simulation per speed. `trace` is at its own speed."""

    trace: Trace
    cluster: ClusterSpec
    strategy: Strategy
    slo: Slo | ScaledSlo
    seed: int
    fault_source: str | None
    with_samples: bool

    def run(self, speed: float) -> tuple[Run, float]:
        """The run at `speed`, and the seconds that it took."""
        trace = scaling.speed(self.trace, speed)
        config = SimConfig(sample_s=max(trace.span_s / _NUM_SAMPLES, 0.1)) if self.with_samples else _NO_SAMPLES
        with shown(f"{speed:g}x") as show, simulating():
            started = time.perf_counter()
            run = self._simulate(trace, config, show, "")
            return run, time.perf_counter() - started

    def capacity(self) -> Capacity:
        with shown("searching capacity") as show:

            def evaluate(speed: float) -> Attainment:
                trace = scaling.speed(self.trace, speed)
                with simulating():
                    return self._simulate(trace, _NO_SAMPLES, show, f"capacity: {speed:g}x").attained

            return find_capacity(evaluate)

    def faults(self, trace: Trace) -> tuple[Fault, ...]:
        """Those of the file, or drawn over this trace's span."""
        return faults_for(self.fault_source, self.cluster, span_s=trace.span_s)

    def _simulate(self, trace: Trace, config: SimConfig, show: Show, text: str) -> Run:
        total = len(trace.requests)
        return simulator.simulate(
            trace,
            self.cluster,
            self.strategy,
            slo=self.slo,
            seed=self.seed,
            faults=self.faults(trace),
            config=config,
            on_progress=lambda ended: show(ended / total, text),
        )


def _load(source: str, rate: float | None, seed: int, tokenizer: Path | None) -> Trace:
    trace = load_trace(source, rate=1.0 if rate is None else rate, seed=seed, tokenizer=tokenizer)
    if rate is not None and not unknown_times(trace):
        raise ConfigError("--rate is for traces without times (ShareGPT), and this one has them; --speed changes its load")
    return trace


def _prepared(trace: Trace, limit: int | None, jitter_s: float, seed: int) -> Trace:
    for note in trace_notes(trace):
        typer.echo(f"note: {note}", err=True)
    if limit is not None:
        trace = scaling.limit(trace, limit)
    if jitter_s:
        trace = scaling.jitter(trace, random.Random(seed), width_s=jitter_s)
    return trace


def _write(outcome: Outcome, *, as_json: bool, html: Path | None, save_requests: Path | None) -> None:
    try:
        _write_files(outcome, html=html, save_requests=save_requests)
    finally:  # a full disk does not take the result along
        typer.echo(msgspec.json.format(msgspec.json.encode(outcome.to_json())) if as_json else outcome.table())


def _write_files(outcome: Outcome, *, html: Path | None, save_requests: Path | None) -> None:
    if save_requests is not None:
        write(save_requests, outcome.request_lines())
    if html is not None:
        from kvasir.cli.simulate.page import page_of  # matplotlib takes half a second
        from kvasir.report.html import render

        write(html, [render(page_of(outcome)).encode()])
        typer.echo(f"note: report in {html}", err=True)
