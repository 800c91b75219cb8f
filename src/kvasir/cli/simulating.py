"""Python's memory as a simulation wants it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from kvasir.native.arenas import use_huge_pages


@contextmanager
def simulating() -> Iterator[None]:
    """Huge pages, and no cyclic garbage collector in its way.

    A simulation makes no cycles worth looking for while it runs, and is one big cycle afterwards. The next one throws that
    away: who runs only one does not wait for it.
    """
    use_huge_pages()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
