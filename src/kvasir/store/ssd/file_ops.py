"""The seam between the SSD tier and the operating system: five calls on files, so that tests can make each of them fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

Buffers = Sequence[memoryview]


class FileOps(Protocol):
    """All raise OSError; reads and writes return how many bytes they moved, maybe fewer than asked. Any thread may call."""

    def open(self, path: Path, flags: int) -> int: ...

    def allocate(self, fd: int, num_bytes: int) -> None: ...

    def preadv(self, fd: int, buffers: Buffers, offset: int) -> int: ...

    def pwritev(self, fd: int, buffers: Buffers, offset: int) -> int: ...

    def sync(self, fd: int) -> None: ...


class SystemFiles:
    """The real ones."""

    def open(self, path: Path, flags: int) -> int:
        """A file that is made is readable by its owner only: it holds what users wrote, as KVCache."""
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def allocate(self, fd: int, num_bytes: int) -> None:
        """Reserve the first `num_bytes` on the disk; bytes that were not there are zero."""
        os.posix_fallocate(fd, 0, num_bytes)

    def preadv(self, fd: int, buffers: Buffers, offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Buffers, offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)


def read_whole(ops: FileOps, fd: int, buffers: Buffers, offset: int, *, unit: int = 1) -> None:
    """Fill all of `buffers`. A read that stops short is continued where it stopped, at a multiple of `unit` bytes.

    Raises OSError, EIO at the end of the file.
    """
    _whole(ops.preadv, fd, buffers, offset, unit)


def write_whole(ops: FileOps, fd: int, buffers: Buffers, offset: int, *, unit: int = 1) -> None:
    """Write all of `buffers`; as `read_whole`."""
    _whole(ops.pwritev, fd, buffers, offset, unit)


class _Move(Protocol):
    def __call__(self, fd: int, buffers: Buffers, offset: int, /) -> int: ...


def _whole(move: _Move, fd: int, buffers: Buffers, offset: int, unit: int) -> None:
    left = list(buffers)
    while left:
        moved = move(fd, left, offset) // unit * unit
        if not moved:
            raise OSError(errno.EIO, "nothing more was moved")
        offset += moved
        left = _after(left, moved)


def _after(buffers: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """What follows the first `num_bytes`."""
    for index, buffer in enumerate(buffers):
        if num_bytes < buffer.nbytes:
            return [buffer[num_bytes:], *buffers[index + 1 :]]
        num_bytes -= buffer.nbytes
    return []
