"""Copies between buffers, as fast as the machine can: large ones stream past its caches where it has the instructions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from kvasir.native.cpp import NotCompiledError, build

Bytes = npt.NDArray[np.uint8]
Copy = Callable[[Bytes, Bytes], None]
"""(target, source): as many bytes each, contiguous and apart from each other."""

STREAMED_BYTES = 256 << 10
"""From this size on a copy streams. Smaller ones are as fast through the cache, and their bytes are then at hand."""


@cache
def fastest_copy() -> Copy:
    """What copies best here: streaming, or numpy's plain copy where there is no compiler or no such instruction.

    The first call on a machine compiles (a second); so ask when starting up.
    """
    try:
        library = ctypes.CDLL(str(build("kvasir.store")))
    except (NotCompiledError, OSError):
        return plain_copy
    return streaming_copy(library) if library.kvasir_can_stream() else plain_copy


def plain_copy(target: Bytes, source: Bytes) -> None:
    """Through the caches."""
    np.copyto(target, source)


def streaming_copy(library: ctypes.CDLL) -> Copy:
    """Past the caches from STREAMED_BYTES on; other threads of Python run meanwhile."""
    stream = library.kvasir_stream
    stream.argtypes, stream.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], None

    def copy(target: Bytes, source: Bytes) -> None:
        length = target.nbytes
        if length < STREAMED_BYTES:
            np.copyto(target, source)
            return
        if source.nbytes != length or not (target.flags.c_contiguous and source.flags.c_contiguous and target.flags.writeable):
            raise ValueError(f"cannot copy {source.nbytes} bytes over {length}: both must be contiguous and of one size")
        stream(target.ctypes.data, source.ctypes.data, length)

    return copy
