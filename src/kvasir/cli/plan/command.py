"""The `kvasir plan` command: a trace and hardware in; answers with the runs behind them out."""

from __future__ import annotations

import os
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvasir.cli.files import check_writable, write
from kvasir.cli.plan.outcome import Outcome
from kvasir.cli.plan.workers import evaluator
from kvasir.cli.simulate.inputs import cluster_from, load_trace, objectives, read_text
from kvasir.cli.simulate.outcome import trace_notes
from kvasir.cli.simulate.progress import shown
from kvasir.cli.workers import interrupts_held
from kvasir.core.errors import ConfigError
from kvasir.costs.hardware import HARDWARE
from kvasir.costs.roofline import RooflineCost
from kvasir.simulator.planner import (
    EXPECTED_QUICK_RUNS,
    EXPECTED_RUNS,
    Player,
    Setting,
    advise,
    facts_of,
    with_nodes_needed,
)
from kvasir.simulator.spec import ClusterSpec
from kvasir.workload import scaling
from kvasir.workload.trace import Trace

QUICK_REQUESTS = 1_500
"""What --quick looks at."""

_FIRST_GUESS = 4
"""How many nodes are tried first when --nodes is not given."""


def plan(
    trace: Annotated[
        str,
        typer.Argument(
            help="Mooncake JSONL, Azure or BurstGPT CSV, ShareGPT JSON, or synthetic:conversation[?seed=3&requests=200]."
        ),
    ],
    hardware: Annotated[str, typer.Option(help="Of a node: a800, h800, h200, or a TOML file of its figures.")],
    model: Annotated[str, typer.Option(help="A known model, or a checkpoint directory (./NAME).")] = "llama3-70b",
    nodes: Annotated[int | None, typer.Option(min=1, help="How many there are. [default: as many as the load needs]")] = None,
    slo_ttft: Annotated[
        str, typer.Option(help="Longest time to first token, or scaled: max(2 s, 5x unloaded prefill).")
    ] = "30s",
    slo_tbt: Annotated[str, typer.Option(help="Longest mean of a request's longest 10 % of token gaps.")] = "100ms",
    rate: Annotated[float | None, typer.Option(help="Target load, requests per second. [default: the trace's]")] = None,
    speed: Annotated[float | None, typer.Option(help="Target load, in multiples of the trace's.")] = None,
    dram: Annotated[str | None, typer.Option(help="For KVCache, of a node. [default: the hardware's]")] = None,
    ssd: Annotated[str, typer.Option(help="For KVCache, of a node.")] = "0",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help=f"Coarse: the first {QUICK_REQUESTS:,} requests, fewer runs.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Simulations at a time. [default: one per core]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Checkpoint directory whose tokenizer counts ShareGPT's tokens.")
    ] = None,
) -> None:
    """Advise what to build for a trace: roles, memory, nodes, and what happens when things go wrong.

    Each answer comes with the simulations behind it, about 60 in all. The trace and the hardware are enough:

        kvasir plan conversation_trace.jsonl --hardware h800

    A first look in a minute, then the whole with a page of plots:

        kvasir plan trace.csv --hardware h800 --nodes 16 --quick

        kvasir plan trace.csv --hardware h800 --nodes 16 --html plan.html

    Another model, load, objective and memory:

        kvasir plan trace.csv --hardware a800 --model qwen3-32b --rate 5 --slo-ttft 10s --slo-tbt 50ms --dram 512GiB --ssd 3.2TB
    """
    check_writable(html, reads=(trace, hardware))
    slo = objectives(slo_ttft, slo_tbt)
    base = _base(hardware, model, dram, ssd)
    whole = load_trace(trace, rate=rate or 1.0, seed=seed, tokenizer=tokenizer)
    target_speed = _speed(rate, speed, facts_of(whole).rate)
    played = scaling.limit(whole, QUICK_REQUESTS) if quick else whole
    facts = facts_of(played)
    notes = tuple(_notes(whole, played))
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    node, kv_bytes, bandwidth = base.nodes[0], base.kv_bytes_per_token, _ssd_bandwidth(base)
    setting = Setting(
        nodes=nodes or _FIRST_GUESS,
        dram_bytes=node.dram_tokens * kv_bytes,
        ssd_bytes=node.ssd_tokens * kv_bytes,
        rate=facts.rate * target_speed,
        working_set_bytes=facts.distinct_tokens * kv_bytes,
        can_ssd=all(bandwidth),
        facts=facts,
        is_quick=quick,
    )
    player = Player(played, facts, base, slo, target_speed, bandwidth, seed)
    started = time.perf_counter()
    expected, done = EXPECTED_QUICK_RUNS if quick else EXPECTED_RUNS, 0
    with ExitStack() as stack:
        with interrupts_held():
            show = stack.enter_context(shown("planning"))

        def on_run() -> None:
            nonlocal done
            done += 1
            show(min(done / expected, 1.0), f"{done} of about {max(expected, done)} runs")

        evaluate = stack.enter_context(evaluator(player, jobs=jobs or len(os.sched_getaffinity(0)), on_run=on_run))
        advice = advise(setting if nodes else with_nodes_needed(setting, evaluate), evaluate)
    outcome = Outcome(
        advice=advice,
        trace_name=Path(trace).name,
        hardware=hardware,
        model=model,
        slo=slo,
        speed=target_speed,
        seed=seed,
        wall_s=time.perf_counter() - started,
        notes=notes,
        command=shlex.join(["kvasir", *sys.argv[1:]]),
    )
    try:
        if html is not None:
            _write_page(outcome, html)
    finally:  # a full disk does not take the answers along
        typer.echo(msgspec.json.format(msgspec.json.encode(outcome.to_json())) if json else outcome.text())


def _write_page(outcome: Outcome, html: Path) -> None:
    from kvasir.cli.plan.page import page_of  # matplotlib takes half a second
    from kvasir.report.html import render

    write(html, [render(page_of(outcome)).encode()])
    typer.echo(f"note: report in {html}", err=True)


def _base(hardware: str, model: str, dram: str | None, ssd: str) -> ClusterSpec:
    """One node of the hardware, with one instance of the model. Raises ConfigError."""
    path = Path(hardware)
    is_file = path.is_file() or hardware.endswith(".toml")
    if not is_file and hardware not in HARDWARE:
        raise ConfigError(f"unknown --hardware {hardware!r}; known are {', '.join(HARDWARE)}, or a TOML file of its figures")
    keys = {"name": "plan", "split": "elastic", "model": model, "ssd": ssd, "dram": dram}
    lines = ["nodes = 1", *(f"{key} = {_quoted(value)}" for key, value in keys.items() if value is not None)]
    lines.append(f"[hardware]\n{read_text(path)}" if is_file else f"hardware = {_quoted(hardware)}")
    return cluster_from("\n".join(lines))


def _quoted(text: str) -> str:
    """A JSON string is a TOML string."""
    return msgspec.json.encode(text).decode()


def _ssd_bandwidth(base: ClusterSpec) -> tuple[float, float]:
    """Read and write, of a drive of the hardware; 0 where that is not known."""
    assert isinstance(base.costs, RooflineCost), "the base names no profile"
    return base.costs.hardware.ssd_read_bandwidth, base.costs.hardware.ssd_write_bandwidth


def _speed(rate: float | None, speed: float | None, own_rate: float) -> float:
    """How many times as fast the trace must come to be the target load. Raises ConfigError."""
    if rate is not None and speed is not None:
        raise ConfigError("--rate and --speed both say what the target load is; give one")
    for name, value in (("rate", rate), ("speed", speed)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} must be positive, got {value:g}")
    return rate / own_rate if rate is not None else speed or 1.0


def _notes(whole: Trace, played: Trace) -> list[str]:
    notes = list(trace_notes(whole))
    if len(played.requests) < len(whole.requests):
        notes.append(f"a quick look: the first {len(played.requests):,} of {len(whole.requests):,} requests; caches start cold")
    return notes
