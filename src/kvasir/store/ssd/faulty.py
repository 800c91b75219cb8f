"""Files that fail as disks do, by a seeded plan: for tests of whatever stands on the SSD tier."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random

from kvasir.store.arena import PAGE_BYTES
from kvasir.store.ssd.buffers import aligned
from kvasir.store.ssd.file_ops import Buffers, FileOps, SystemFiles

SECTOR_BYTES = 512
"""What a disk writes whole or not at all."""


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Probabilities, each for one system call. A call stalls until `FaultyFiles.release`, but at most `longest_stall_s`."""

    torn_write: float = 0.0
    """Writes a part and says that it wrote all."""
    flip_on_write: float = 0.0
    """One bit reaches the disk wrong."""
    flip_on_read: float = 0.0
    """One bit comes wrong."""
    short_write: float = 0.0
    short_read: float = 0.0
    write_error: float = 0.0
    read_error: float = 0.0
    no_space: float = 0.0
    read_only: float = 0.0
    stall: float = 0.0
    longest_stall_s: float = 30.0


class FaultyFiles:
    """FileOps with faults. `plan` may be exchanged at any time; `happened` counts faults by the name of their field."""

    def __init__(self, seed: int, plan: FaultPlan | None = None, ops: FileOps | None = None):
        self.plan = plan if plan is not None else FaultPlan()
        self.happened = {field.name: 0 for field in fields(FaultPlan)}
        self._rng = Random(seed)
        self._ops: FileOps = ops if ops is not None else SystemFiles()
        self._lock = threading.Lock()
        self._released = threading.Event()

    def release(self) -> None:
        """Let go of all that is stalled, and stall nothing more."""
        self._released.set()

    def open(self, path: Path, flags: int) -> int:
        self._refuse_writes("open", path)
        return self._ops.open(path, flags)

    def allocate(self, fd: int, num_bytes: int) -> None:
        self._refuse_writes("allocate", None)
        self._ops.allocate(fd, num_bytes)

    def preadv(self, fd: int, buffers: Buffers, offset: int) -> int:
        self._stall()
        if self._draw("read_error", self.plan.read_error):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if _pages(buffers) > 1 and self._draw("short_read", self.plan.short_read):
            return self._ops.preadv(fd, self._some(buffers, at_least=1), offset)
        moved = self._ops.preadv(fd, buffers, offset)
        if moved and self._draw("flip_on_read", self.plan.flip_on_read):
            self._flip(buffers)
        return moved

    def pwritev(self, fd: int, buffers: Buffers, offset: int) -> int:
        self._stall()
        self._refuse_writes("write", None)
        if self._draw("write_error", self.plan.write_error):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if _pages(buffers) > 1 and self._draw("short_write", self.plan.short_write):
            return self._ops.pwritev(fd, self._some(buffers, at_least=1), offset)
        if self._draw("torn_write", self.plan.torn_write):
            self._ops.pwritev(fd, self._some(buffers, at_least=0), offset)
            return sum(buffer.nbytes for buffer in buffers)
        if self._draw("flip_on_write", self.plan.flip_on_write):
            return self._ops.pwritev(fd, self._flipped(buffers), offset)
        return self._ops.pwritev(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self._stall()
        self._ops.sync(fd)

    def _draw(self, name: str, probability: float) -> bool:
        with self._lock:
            if not probability or self._rng.random() >= probability:
                return False
            self.happened[name] += 1
            return True

    def _refuse_writes(self, what: str, path: Path | None) -> None:
        for name, probability, code in (
            ("no_space", self.plan.no_space, errno.ENOSPC),
            ("read_only", self.plan.read_only, errno.EROFS),
        ):
            if not (what == "open" and name == "no_space") and self._draw(name, probability):
                raise OSError(code, os.strerror(code), str(path) if path is not None else None)

    def _stall(self) -> None:
        if not self._released.is_set() and self._draw("stall", self.plan.stall):
            self._released.wait(self.plan.longest_stall_s)

    def _some(self, buffers: Buffers, *, at_least: int) -> list[memoryview]:
        """The first pages, not all of them."""
        with self._lock:
            left = PAGE_BYTES * self._rng.randrange(at_least, max(1, _pages(buffers)))
        kept = []
        for buffer in buffers:
            kept.append(buffer[:left])
            left -= kept[-1].nbytes
        return [buffer for buffer in kept if buffer.nbytes] or [memoryview(b"")]

    def _flip(self, buffers: Sequence[memoryview]) -> None:
        with self._lock:
            buffer = buffers[self._rng.randrange(len(buffers))]
            buffer[self._rng.randrange(buffer.nbytes)] ^= 1 << self._rng.randrange(8)

    def _flipped(self, buffers: Buffers) -> list[memoryview]:
        """A copy in memory that direct I/O takes, with one bit changed."""
        copies = []
        for buffer in buffers:
            copy = aligned(buffer.nbytes)
            copy[:] = buffer
            copies.append(copy.data)
        self._flip(copies)
        return copies


def _pages(buffers: Buffers) -> int:
    return sum(buffer.nbytes for buffer in buffers) // PAGE_BYTES


class VolatileFiles:
    """FileOps that remember what a disk may still lose: `lose_power` undoes any sectors written since the last `sync`."""

    def __init__(self, seed: int, ops: FileOps | None = None):
        self._rng = Random(seed)
        self._ops: FileOps = ops if ops is not None else SystemFiles()
        self._paths: dict[int, Path] = {}
        self._undo: list[tuple[Path, int, bytes]] = []

    def open(self, path: Path, flags: int) -> int:
        fd = self._ops.open(path, flags)
        self._paths[fd] = path
        return fd

    def allocate(self, fd: int, num_bytes: int) -> None:
        self._ops.allocate(fd, num_bytes)

    def preadv(self, fd: int, buffers: Buffers, offset: int) -> int:
        return self._ops.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Buffers, offset: int) -> int:
        length = sum(buffer.nbytes for buffer in buffers)
        first = offset // SECTOR_BYTES * SECTOR_BYTES
        with self._paths[fd].open("rb") as file:
            file.seek(first)
            before = file.read(offset + length - first)
        self._undo += [
            (self._paths[fd], first + at, before[at : at + SECTOR_BYTES]) for at in range(0, len(before), SECTOR_BYTES)
        ]
        return self._ops.pwritev(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self._ops.sync(fd)
        path = self._paths[fd]
        self._undo = [entry for entry in self._undo if entry[0] != path]

    def lose_power(self, share: float) -> None:
        """Each sector written since then gets its older bytes back with probability `share`. For files that nobody has open."""
        for path, offset, before in reversed(self._undo):
            if self._rng.random() < share:
                with path.open("r+b") as file:
                    file.seek(offset)
                    file.write(before)
        self._undo.clear()
