"""A node's DRAM arena: equal slots of shared memory that the pool process makes and the instances of the node map.

    0            4096                      header_bytes
    | magic, sizes | generations (uint32) … | missing (uint32) … | slot 0 | slot 1 | … |        every part starts on a page

The memory is a memfd: it has no name, so nothing is left behind when its last process ends, however it ends. Another process
opens it as /proc/<pid>/fd/<fd> (same user, same pid namespace), which needs no second socket as passing the descriptor over
one would; magic and a random id in the header tell a recycled pid from the arena that was meant.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from kvasir.core.errors import ClusterError, ConfigError
from kvasir.core.units import format_size

PAGE_BYTES = 4096
MAGIC = b"KVASIRKV"
VERSION = 2
RESERVE = 0.05
"""Share of the machine's memory that an arena may not take."""

_HEADER = struct.Struct("<8sIIQQ16s")  # magic, version, num_slots, stride, slot_bytes, id


class ArenaHandle(Struct, frozen=True):
    """All that another process needs to map an arena."""

    pid: int
    fd: int
    id: bytes
    num_slots: int
    stride: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class Arena:
    """Slot i is `memory[i * stride : i * stride + slot_bytes]`; `generations[i]` grows each time slot i is reserved anew.

    `missing[i]` is how many of its layers are still on their way here. All arrays are shared: a write by one process is seen
    by all. The mapping lives as long as any array over it.
    """

    memory: npt.NDArray[np.uint8]
    generations: npt.NDArray[np.uint32]
    missing: npt.NDArray[np.uint32]
    handle: ArenaHandle

    @property
    def stride(self) -> int:
        return self.handle.stride

    @property
    def num_slots(self) -> int:
        return self.handle.num_slots

    def close(self) -> None:
        """For the process that made it: nobody can open it from now on. The memory goes with the last mapping."""
        os.close(self.handle.fd)

    def slot(self, index: int) -> npt.NDArray[np.uint8]:
        """The bytes of one block, writable."""
        start = index * self.handle.stride
        return self.memory[start : start + self.handle.slot_bytes]


def slots_that_fit(dram_bytes: int, slot_bytes: int) -> int:
    """How many slots an arena of at most `dram_bytes` has."""
    return max(0, dram_bytes - PAGE_BYTES) // (_stride(slot_bytes) + 8)


def create_arena(num_slots: int, slot_bytes: int) -> Arena:
    """Make an arena in this process; it exists until the last process that mapped it ends.

    Raises ConfigError, before anything is allocated, when the machine's or the control group's free memory is smaller.
    """
    if num_slots < 1 or slot_bytes < 1:
        raise ConfigError(f"an arena needs at least one slot of one byte, got {num_slots} slots of {slot_bytes} bytes")
    stride = _stride(slot_bytes)
    size = _header_bytes(num_slots) + num_slots * stride
    _require_memory(size)
    fd = os.memfd_create("kvasir-arena", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    handle = ArenaHandle(os.getpid(), fd, secrets.token_bytes(16), num_slots, stride, slot_bytes)
    mapped = mmap.mmap(fd, size)
    mapped[: _HEADER.size] = _HEADER.pack(MAGIC, VERSION, num_slots, stride, slot_bytes, handle.id)
    return _arena(mapped, handle)


def open_arena(handle: ArenaHandle) -> Arena:
    """Map an arena that another process made. Raises ClusterError when it is gone or is not the one that was meant."""
    path = f"/proc/{handle.pid}/fd/{handle.fd}"
    size = _header_bytes(handle.num_slots) + handle.num_slots * handle.stride
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ClusterError(f"cannot open the arena of process {handle.pid}: {error.strerror}; is it this user's?") from error
    try:
        _require_same(fd, size, handle)
        return _arena(mmap.mmap(fd, size), handle)
    finally:
        os.close(fd)


def _arena(mapped: mmap.mmap, handle: ArenaHandle) -> Arena:
    if hasattr(mmap, "MADV_HUGEPAGE"):  # honoured where shmem_enabled is `advise`; costs nothing elsewhere
        mapped.madvise(mmap.MADV_HUGEPAGE)
    everything = np.frombuffer(mapped, dtype=np.uint8)
    first, second = PAGE_BYTES, PAGE_BYTES + _stride(4 * handle.num_slots)
    generations, missing = (everything[at : at + 4 * handle.num_slots].view(np.uint32) for at in (first, second))
    return Arena(everything[_header_bytes(handle.num_slots) :], generations, missing, handle)


def _stride(slot_bytes: int) -> int:
    return -(-slot_bytes // PAGE_BYTES) * PAGE_BYTES


def _header_bytes(num_slots: int) -> int:
    return PAGE_BYTES + 2 * _stride(4 * num_slots)


def _require_same(fd: int, size: int, handle: ArenaHandle) -> None:
    expected = (MAGIC, VERSION, handle.num_slots, handle.stride, handle.slot_bytes, handle.id)
    raw = os.pread(fd, _HEADER.size, 0)
    if len(raw) < _HEADER.size or _HEADER.unpack(raw) != expected or os.fstat(fd).st_size != size:
        raise ClusterError(f"/proc/{handle.pid}/fd/{handle.fd} is not the arena that was announced; was the pool restarted?")


def _require_memory(size: int) -> None:
    limit, where = min((_available_bytes(), "free memory"), (_cgroup_bytes(), "memory left in the control group"))
    usable = int(limit * (1 - RESERVE))
    if size > usable:
        raise ConfigError(f"arena of {format_size(size)} does not fit: {format_size(limit)} {where}; lower --dram")


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES


def _cgroup_bytes() -> int:
    """Bytes until the tightest memory limit of this process's control groups, version 2 or 1."""
    left = [1 << 62]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            left += _left_up_the_tree(Path("/sys/fs/cgroup"), path, _V2)
        elif "memory" in controllers.split(","):
            left += _left_up_the_tree(Path("/sys/fs/cgroup/memory"), path, _V1)
    return min(left)


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    """Where a control group's limit is, its use, and how much of that is file cache that the kernel would give up."""

    limit: str
    used: str
    reclaimable: str


_V2 = _CgroupFiles("memory.max", "memory.current", "inactive_file")
_V1 = _CgroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left_up_the_tree(root: Path, path: str, files: _CgroupFiles) -> list[int]:
    """What is left in a group and in each one above it; a container may see no more than the root."""
    group = root / path.lstrip("/")
    directories = [d for d in [group, *group.parents] if d.is_relative_to(root) and (d / files.limit).exists()]
    return [left for directory in directories if (left := _left_in(directory, files)) is not None]


def _left_in(directory: Path, files: _CgroupFiles) -> int | None:
    limit = (directory / files.limit).read_text().strip()
    if limit == "max":
        return None
    stat = dict(line.split(maxsplit=1) for line in (directory / "memory.stat").read_text().splitlines())
    used = int((directory / files.used).read_text()) - int(stat.get(files.reclaimable, 0))
    return int(limit) - used
