"""The progress line of a simulation, on stderr and only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

Show = Callable[[float, str], None]
"""(share done, what is going on) → the line says so."""


@contextmanager
def shown(description: str) -> Iterator[Show]:
    """A line that disappears at the end; does nothing where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda share, text: None
        return
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=1.0)
        yield lambda share, text: bar.update(task, completed=share, description=text or description)
