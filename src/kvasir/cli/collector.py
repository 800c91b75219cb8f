"""Python's cyclic garbage collector, kept out of a simulation's way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """A simulation makes no cycles worth looking for while it runs, and is one big cycle afterwards.

    The next one throws that away: who runs only one does not wait for it.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
