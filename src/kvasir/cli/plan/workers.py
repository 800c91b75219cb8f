"""Simulations in processes of their own, as many at a time as asked for."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from kvasir.cli.collector import collector_paused
from kvasir.core.errors import ClusterError
from kvasir.simulator.planner import Evaluate, Figures, Player, RunSpec

_ORPHANED = 1


@contextmanager
def evaluator(player: Player, *, jobs: int, on_run: Callable[[], None]) -> Iterator[Evaluate]:
    """Evaluates runs in `jobs` processes; `on_run` hears of each. Nothing is left running when the block ends or fails."""
    context = multiprocessing.get_context("spawn")  # this process has threads
    with open(os.memfd_create("player"), "wb") as file:  # by file: starting a worker waits for what it is sent
        pickle.dump(player, file)
        file.flush()
        path = Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(path,)) as pool:

            def evaluate(runs: Sequence[RunSpec]) -> list[Figures]:
                with interrupts_held():
                    futures = [pool.submit(_play, run) for run in runs]
                for future in as_completed(futures):
                    future.result()
                    on_run()
                return [future.result() for future in futures]

            try:
                yield evaluate
            except BrokenProcessPool:
                raise ClusterError("a simulation's process died, out of memory perhaps; try --jobs 1 or --quick") from None
            except BaseException:
                for child in multiprocessing.active_children():
                    child.terminate()  # leaving the pool would wait for the runs in hand
                raise


@contextmanager
def interrupts_held() -> Iterator[None]:
    """An interrupt is heard when the block ends. Threads and processes that are started in it hear none, ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_player: Player


def _begin(path: Path) -> None:
    """In a worker, which ends with its parent, however that dies."""
    global _player
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are children"

    def outlive_nobody() -> None:
        parent.join()
        os._exit(_ORPHANED)

    threading.Thread(target=outlive_nobody, daemon=True).start()
    _player = pickle.loads(path.read_bytes())


def _play(run: RunSpec) -> Figures:
    with collector_paused():
        return _player.play(run)
