"""How much of the machine an engine's threads take beside others' (Linux, where each thread has a priority of its own)."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

NAME = "kvasir-engine"
"""Threads inherit it from the one that starts them; the kernel keeps 15 characters."""

_TASKS = Path("/proc/self/task")


def name_threads() -> None:
    """Give this thread, and those that it will start, the name by which `go_idle` knows them."""
    (_TASKS / str(threading.get_native_id()) / "comm").write_text(NAME)


def go_idle() -> None:
    """Leave all threads of that name, and those that they will start, only the time that nothing else wants.

    There is no way back without privilege.
    """
    for thread in _TASKS.iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if (thread / "comm").read_text().strip() == NAME:
                os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
