"""Processes that work for a command, and its interrupts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial

_ORPHANED = 1


@contextmanager
def workers(jobs: int, begin: Callable[[], object] | None = None) -> Iterator[ProcessPoolExecutor]:
    """`jobs` processes, each of which calls `begin` first. None outlives the block, nor this process, however that ends.

    They start when the first task is submitted, which belongs within `interrupts_held`.
    """
    context = multiprocessing.get_context("spawn")  # this process has threads
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=partial(_begin, begin)) as pool:
        try:
            yield pool
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()  # leaving the pool would wait for the tasks in hand
            raise


@contextmanager
def interrupts_held() -> Iterator[None]:
    """An interrupt is heard when the block ends. Threads and processes that are started in it hear none, ever.

    For the main thread only, where Python calls handlers, also of signals that a library's thread has taken.
    """
    heard: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if heard:
            signal.raise_signal(signal.SIGINT)


def _begin(begin: Callable[[], object] | None) -> None:
    """In a worker, which ends with its parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are children"

    def outlive_nobody() -> None:
        parent.join()
        os._exit(_ORPHANED)

    threading.Thread(target=outlive_nobody, daemon=True).start()
    if begin is not None:
        begin()
