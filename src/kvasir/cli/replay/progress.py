"""The progress line of a replay: sent, in flight, done, rejected, failed; on stderr, and only on a terminal."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from kvasir.cli.replay.load import Progress

_REFRESH_S = 0.25


@asynccontextmanager
async def shown(progress: Progress, num_requests: int) -> AsyncIterator[None]:
    """Keep the line up to date for as long as the block runs."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    columns = (
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, transient=True, auto_refresh=False) as bar:
        async with asyncio.TaskGroup() as group:
            painter = group.create_task(_paint(bar, progress, num_requests))
            yield
            painter.cancel()


async def _paint(bar: Bar, progress: Progress, num_requests: int) -> None:
    task = bar.add_task("", total=num_requests)
    while True:
        bar.update(
            task,
            completed=len(progress.records),
            description=f"{progress.num_in_flight} in flight, {progress.num_rejected} rejected, {progress.num_failed} failed",
            refresh=True,
        )
        await asyncio.sleep(_REFRESH_S)
