"""Simulations in processes of their own, as many at a time as asked for."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kvasir.cli.simulating import simulating
from kvasir.cli.workers import interrupts_held, workers
from kvasir.core.errors import ClusterError
from kvasir.simulator.planner import Evaluate, Figures, Player, RunSpec


@contextmanager
def evaluator(player: Player, *, jobs: int, on_run: Callable[[], None]) -> Iterator[Evaluate]:
    """Evaluates runs in `jobs` processes; `on_run` hears of each. Nothing is left running when the block ends or fails."""
    with open(os.memfd_create("player"), "wb") as file:  # by file: starting a worker waits for what it is sent
        pickle.dump(player, file)
        file.flush()
        path = Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")
        try:
            with workers(jobs, partial(_begin, path)) as pool:

                def evaluate(runs: Sequence[RunSpec]) -> list[Figures]:
                    with interrupts_held():
                        futures = [pool.submit(_play, run) for run in runs]
                    for future in as_completed(futures):
                        future.result()
                        on_run()
                    return [future.result() for future in futures]

                yield evaluate
        except BrokenProcessPool:
            raise ClusterError("a simulation's process died, out of memory perhaps; try --jobs 1 or --quick") from None


_player: Player


def _begin(path: Path) -> None:
    global _player
    _player = pickle.loads(path.read_bytes())


def _play(run: RunSpec) -> Figures:
    with simulating():
        return _player.play(run)
