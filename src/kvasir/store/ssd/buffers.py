"""The memory of a block as direct I/O wants it: whole pages on page borders; what is missing is borrowed.

    block of slot_bytes   | whole pages, in place …………… | rest |
    given to the kernel   | the same memory               | a page of our own |

A block whose memory does not start on a page is copied as a whole. Slots of an arena never are.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvasir.store.arena import PAGE_BYTES

Bytes = npt.NDArray[np.uint8]
"""One dimension, contiguous."""


class Pieces(NamedTuple):
    """`views` cover a place; `borrowed` is the memory among them that is not the block's, and starts at its byte `start`."""

    views: tuple[memoryview, ...]
    start: int
    borrowed: Bytes | None

    def give_back_to(self, block: Bytes) -> None:
        """After a read: copy what came into borrowed memory."""
        if self.borrowed is not None:
            block[self.start :] = self.borrowed[: block.nbytes - self.start]


def views_to_write(block: Bytes) -> tuple[memoryview, ...]:
    """Memory with the bytes of a block in it."""
    view = block.data
    if _is_whole_pages(block, view):
        return (view,)
    pieces = pieces_to_read(block)
    assert pieces.borrowed is not None, "what is not whole pages borrows some"
    pieces.borrowed[: block.nbytes - pieces.start] = block[pieces.start :]
    return pieces.views


def pieces_to_read(block: Bytes) -> Pieces:
    """Memory that is to be filled; call `give_back_to` afterwards."""
    view = block.data
    if _is_whole_pages(block, view):
        return Pieces((view,), view.nbytes, None)
    whole = block.nbytes // PAGE_BYTES * PAGE_BYTES if _address(block, view) % PAGE_BYTES == 0 else 0
    borrowed = aligned(-(-(block.nbytes - whole) // PAGE_BYTES) * PAGE_BYTES)
    views = (block[:whole].data, borrowed.data) if whole else (borrowed.data,)
    return Pieces(views, whole, borrowed)


def aligned(num_bytes: int) -> Bytes:
    """Zeroed memory that starts on a page."""
    roomy = np.zeros(num_bytes + PAGE_BYTES, dtype=np.uint8)
    start = -_address(roomy, roomy.data) % PAGE_BYTES
    return roomy[start : start + num_bytes]


def _is_whole_pages(block: Bytes, view: memoryview) -> bool:
    return not (_address(block, view) | view.nbytes) % PAGE_BYTES


def _address(block: Bytes, view: memoryview) -> int:
    if not view.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))
    address: int = block.__array_interface__["data"][0]  # takes four times as long
    return address
