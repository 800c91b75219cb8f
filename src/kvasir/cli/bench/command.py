"""The group of `kvasir bench` commands."""

from __future__ import annotations

import typer

from kvasir.cli.bench.paper import paper

bench = typer.Typer(help="Redraw published results, and measure.", no_args_is_help=True)
bench.command()(paper)


@bench.callback()
def _group() -> None:
    """Keeps it a group while there is one command."""
