"""Python's small objects in huge pages: of a simulation's millions, most are touched seldom, each in a page of its own."""

from __future__ import annotations

import ctypes
from functools import cache

from kvasir.native.cpp import NotCompiledError, build


@cache
def use_huge_pages() -> bool:
    """From now on, for good, where there is a compiler; whether there is. A kernel without huge pages gives ordinary ones.

    Memory that is freed stays with the process. The first call on a machine compiles (a second).
    """
    try:
        library = ctypes.PyDLL(str(build("kvasir.native")))
    except (NotCompiledError, OSError):
        return False
    library.kvasir_use_huge_arenas()
    return True
