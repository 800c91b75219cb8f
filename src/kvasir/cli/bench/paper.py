"""`kvasir bench paper`: the figures of the Mooncake papers, simulated again, as a page of tables and plots."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from kvasir.cli.bench.processes import results_of
from kvasir.cli.files import check_folder, write
from kvasir.cli.simulate.inputs import load_trace
from kvasir.cli.simulate.progress import shown
from kvasir.core.errors import ConfigError
from kvasir.workload import scaling
from kvasir.workload.source import is_synthetic

if TYPE_CHECKING:
    from kvasir.simulator.experiments import Bed, Experiment, Figure

SYNTHETIC = "synthetic:conversation"
QUICK_REQUESTS = 300
"""A slice that is simulated in a second: it shows that all of it works, and nothing else."""


def paper(
    trace: Annotated[str, typer.Option(help="The conversation trace of the FAST'25 release, or any other.")] = SYNTHETIC,
    only: Annotated[list[str] | None, typer.Option(help="Only this experiment; can be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for paper.md and paper/*.svg; without it, no files.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Simulations at the same time; as many as cores.")] = os.cpu_count() or 1,
    quick: Annotated[bool, typer.Option("--quick", help=f"Only the first {QUICK_REQUESTS} requests.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of Markdown.")] = False,
) -> None:
    """Redraw the figures of the Mooncake papers on the simulator, each beside the paper's own values.

    All of them, as a page with plots; it takes minutes:

        kvasir bench paper --trace conversation_trace.jsonl --out docs/results

    Some of them, on a slice of a synthetic trace:

        kvasir bench paper --only overload --only ratio --quick
    """
    from kvasir.cli.bench.markdown import drawings, page  # matplotlib takes half a second
    from kvasir.simulator import experiments

    chosen = experiments.experiments(only or [])
    if out is not None:
        check_folder(out)
    requests = load_trace(trace)
    bed = experiments.Bed(scaling.limit(requests, QUICK_REQUESTS) if quick else requests)
    figures = _figures(chosen, bed, jobs)
    text = page(figures, conditions=_conditions(trace, bed))
    is_saved = False
    try:
        if out is not None:
            _save(out, text, drawings(figures))
            is_saved = True
    finally:  # a full disk does not take the figures along
        if json:
            typer.echo(msgspec.json.format(msgspec.json.encode(_to_json(figures))))
        elif not is_saved:
            typer.echo(text)


def _figures(chosen: Sequence[Experiment[Any]], bed: Bed, jobs: int) -> list[tuple[Experiment[Any], Figure]]:
    """All simulations of all experiments at once, so that no process waits for an experiment to end."""
    tasks = {(e.name, name): task for e in chosen for name, task in e.tasks(bed).items()}
    typer.echo(f"note: {len(tasks)} simulations, {jobs} at a time", err=True)
    with shown(f"{len(tasks)} simulations") as show:
        results = results_of(tasks, jobs, lambda done, key: show(done / len(tasks), ": ".join(key)))
    return [(e, e.figure(bed, {name: results[owner, name] for owner, name in results if owner == e.name})) for e in chosen]


def _conditions(source: str, bed: Bed) -> dict[str, str]:
    trace = bed.trace
    size = f"{len(trace.requests):,} requests in {trace.span_s:,.0f} s"
    name = source if is_synthetic(source) else Path(source).name
    arguments = (argument.replace(source, name) for argument in sys.argv[1:])  # where it lies is this machine's affair
    return {
        "Trace": f"{name}, {size}",
        "Command": f"`{shlex.join(['kvasir', *arguments])}`",
        "Date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def _to_json(figures: Sequence[tuple[Experiment[Any], Figure]]) -> dict[str, Any]:
    return {
        experiment.name: {
            "title": experiment.title,
            "paper": experiment.paper,
            "setting": experiment.setting,
            "tables": [
                {"title": grid.title, "columns": [{"name": c.name, "values": list(c.values)} for c in grid.columns]}
                for grid in figure.grids
            ],
            "deviation": figure.deviation,
        }
        for experiment, figure in figures
    }


def _save(folder: Path, text: str, plots: dict[str, str]) -> None:
    try:
        (folder / "paper").mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {folder / 'paper'}: {error.strerror}") from None
    write(folder / "paper.md", [text.encode()])
    for name, svg in plots.items():
        write(folder / "paper" / name, [svg.encode()])
    typer.echo(f"note: figures in {folder / 'paper.md'}", err=True)
