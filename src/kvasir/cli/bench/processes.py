"""Independent tasks over a few processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from kvasir.cli.collector import collector_paused

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def results_of(tasks: Mapping[Key, Callable[[], Result]], jobs: int, on_done: Callable[[int, Key], None]) -> dict[Key, Result]:
    """The result of every task by its key, in the order of `tasks`; `on_done` hears how many are done, and the last one.

    A task's error ends it all and is raised here; so does an interrupt, and no process is left.
    """
    if jobs == 1:
        return _one_by_one(tasks, on_done)
    pool = ProcessPoolExecutor(min(jobs, max(1, len(tasks))), multiprocessing.get_context("spawn"), _ignore_interrupts)
    try:
        keys = {pool.submit(_run, task): key for key, task in tasks.items()}
        for done, future in enumerate(as_completed(keys), start=1):
            future.result()
            on_done(done, keys[future])
        return {key: future.result() for future, key in keys.items()}
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(tasks: Mapping[Key, Callable[[], Result]], on_done: Callable[[int, Key], None]) -> dict[Key, Result]:
    results = {}
    for done, (key, task) in enumerate(tasks.items(), start=1):
        results[key] = _run(task)
        on_done(done, key)
    return results


def _run(task: Callable[[], Result]) -> Result:
    with collector_paused():
        return task()


def _ignore_interrupts() -> None:
    """Ctrl-C reaches the whole group; the parent ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
