"""Touch an arena's pages before anyone needs them: a fresh page costs its first writer the time to clear it.

The kernel hands out 0.3 to 2 GB of fresh pages a second. A thread of the lowest priority does it in slot order, the order in
which the pool first gives slots out, so that start-up waits for nothing and the first requests find their pages there.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

from kvasir.store.arena import Arena

CHUNK_BYTES = 16 << 20
"""Bytes per system call: 10 to 50 ms, so that a stop is heard soon."""

MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14
LOWEST_PRIORITY = 19


class Prefault:
    """Runs from construction on; `stop` ends it early. `progress` is called with (bytes done, all bytes) on its thread."""

    def __init__(self, arena: Arena, progress: Callable[[int, int], None] | None = None):
        self._arena = arena
        self._progress = progress
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefault", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """True when it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Takes effect after the current chunk; on a busy machine that may be a while, so do not wait for it at an exit."""
        self._stopped.set()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        memory = self._arena.memory
        for start in range(0, memory.nbytes, CHUNK_BYTES):
            length = min(CHUNK_BYTES, memory.nbytes - start)
            if self._stopped.is_set() or madvise(memory.ctypes.data + start, length, MADV_POPULATE_WRITE):
                return  # an older kernel cannot: then each page comes with its first write
            if self._progress is not None:
                self._progress(start + length, memory.nbytes)
