"""Stopping a process: the signal reaches a running thread later than kill returns, and a fast one would go on till then."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

DEADLINE_S = 10.0


def stop(pid: int) -> None:
    """Stop all threads of a process, and return when they stand; SIGCONT lets it go on."""
    os.kill(pid, signal.SIGSTOP)
    deadline_s = time.monotonic() + DEADLINE_S
    while not _stands_still(pid):
        assert time.monotonic() < deadline_s, f"process {pid} does not stop"
        time.sleep(0.001)


def _stands_still(pid: int) -> bool:
    states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(state == "T" for state in states)
