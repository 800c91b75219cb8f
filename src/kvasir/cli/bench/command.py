"""The group of `kvasir bench` commands."""

from __future__ import annotations

import typer

from kvasir.cli.bench.paper import paper
from kvasir.cli.bench.pool import pool

bench = typer.Typer(help="Redraw published results, and measure.", no_args_is_help=True)
bench.command()(paper)
bench.command()(pool)
