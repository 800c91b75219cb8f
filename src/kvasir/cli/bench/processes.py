"""Independent tasks over a few processes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import as_completed
from typing import TypeVar

from kvasir.cli.simulating import simulating
from kvasir.cli.workers import interrupts_held, workers

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def results_of(tasks: Mapping[Key, Callable[[], Result]], jobs: int, on_done: Callable[[int, Key], None]) -> dict[Key, Result]:
    """The result of every task by its key, in the order of `tasks`; `on_done` hears how many are done, and the last one.

    A task's error ends it all and is raised here; so does an interrupt, and no process is left.
    """
    if jobs == 1:
        return _one_by_one(tasks, on_done)
    with workers(min(jobs, max(1, len(tasks)))) as pool:
        with interrupts_held():
            keys = {pool.submit(_run, task): key for key, task in tasks.items()}
        for done, future in enumerate(as_completed(keys), start=1):
            future.result()
            on_done(done, keys[future])
        return {key: future.result() for future, key in keys.items()}


def _one_by_one(tasks: Mapping[Key, Callable[[], Result]], on_done: Callable[[int, Key], None]) -> dict[Key, Result]:
    results = {}
    for done, (key, task) in enumerate(tasks.items(), start=1):
        results[key] = _run(task)
        on_done(done, key)
    return results


def _run(task: Callable[[], Result]) -> Result:
    with simulating():
        return task()
