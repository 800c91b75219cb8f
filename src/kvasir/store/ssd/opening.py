"""Open or make the two files of an SSD tier, and say in one line what stands against it."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog

from kvasir.core.errors import ConfigError
from kvasir.core.units import format_size
from kvasir.store.arena import PAGE_BYTES
from kvasir.store.ssd.buffers import aligned
from kvasir.store.ssd.file_ops import FileOps, read_whole, write_whole
from kvasir.store.ssd.layout import (
    DATA_NAME,
    FILE_ID_BYTES,
    MAX_IDENTITY_BYTES,
    RECORD_BYTES,
    TABLE_NAME,
    VERSION,
    Record,
    Superblock,
    data_file_bytes,
    read_records,
    read_superblock,
    record_offset,
    table_file_bytes,
)

TABLE_CHUNK = 4096
"""Records that are read from the table at a time."""


@dataclass(frozen=True, slots=True)
class SsdFiles:
    """Open files, locked as long as `lock_fd` is open. `data_fd` may be the same descriptor."""

    lock_fd: int
    data_fd: int
    table_fd: int
    is_direct: bool
    file_id: bytes
    records: list[Record | None]

    def close(self) -> None:
        for fd in sorted({self.lock_fd, self.data_fd, self.table_fd}):
            os.close(fd)


@dataclass(frozen=True, slots=True)
class SsdPlan:
    """What is wanted: so many places in this directory. `identity` says in words all that makes bytes mean the same KV."""

    directory: Path
    num_slots: int
    slot_bytes: int
    identity: str
    replace_other: bool = False

    def __post_init__(self) -> None:
        if self.num_slots < 1 or self.slot_bytes < 1:
            raise ConfigError(
                f"an SSD tier needs a place of a byte, got {self.num_slots} of {self.slot_bytes} bytes; raise --ssd"
            )
        if not 0 < len(self.identity.encode()) <= MAX_IDENTITY_BYTES:
            raise ConfigError(f"identity of {len(self.identity.encode())} bytes, expected 1 to {MAX_IDENTITY_BYTES}")

    @property
    def data_path(self) -> Path:
        return self.directory / DATA_NAME

    @property
    def table_path(self) -> Path:
        return self.directory / TABLE_NAME


def open_files(plan: SsdPlan, ops: FileOps, *, try_direct: bool) -> SsdFiles:
    """Raises ConfigError; then nothing stays open, and files that were made stay only if they are whole."""
    if not plan.directory.is_dir():
        state = "is not a directory" if plan.directory.exists() else "does not exist"
        raise ConfigError(f"SSD directory {plan.directory} {state}; make it, or name another")
    try:
        return _open_files(plan, ops, try_direct)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise ConfigError(f"cannot use SSD directory {plan.directory}: {why}; name one that this user can write") from error


def _open_files(plan: SsdPlan, ops: FileOps, try_direct: bool) -> SsdFiles:
    with ExitStack() as undo:
        lock_fd = _opened(ops, plan.data_path, undo)
        _lock(lock_fd, plan)
        table_fd = _opened(ops, plan.table_path, undo)
        superblock = _known(plan, _first_page(ops, lock_fd))
        if superblock is None:
            superblock = _made(plan, ops, lock_fd, table_fd)
        else:
            _resize(plan, ops, lock_fd, table_fd)
            _mend_table(plan, ops, table_fd, superblock)
        records = _records(ops, table_fd, superblock.file_id, plan.num_slots)
        direct_fd = _direct(plan, ops, undo) if try_direct else None
        undo.pop_all()
        data_fd = lock_fd if direct_fd is None else direct_fd
        return SsdFiles(lock_fd, data_fd, table_fd, direct_fd is not None, superblock.file_id, records)


def _opened(ops: FileOps, path: Path, undo: ExitStack) -> int:
    fd = ops.open(path, os.O_RDWR | os.O_CREAT)
    undo.callback(os.close, fd)
    return fd


def _lock(fd: int, plan: SsdPlan) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{plan.data_path} is in use by another process; give each node a directory of its own") from error


def _first_page(ops: FileOps, fd: int) -> bytes:
    """Empty when the file is shorter."""
    page = aligned(PAGE_BYTES)
    if os.fstat(fd).st_size < PAGE_BYTES:
        return os.pread(fd, PAGE_BYTES, 0)
    read_whole(ops, fd, [page.data], 0, unit=PAGE_BYTES)
    return page.tobytes()


def _known(plan: SsdPlan, page: bytes) -> Superblock | None:
    """The superblock of a file that holds what is wanted; None if it is to be made. Raises ConfigError for any other file."""
    if not any(page):
        return None  # new, or its making was cut short
    found = read_superblock(page)
    if found is not None and found.version == VERSION and _meaning(found) == (plan.slot_bytes, plan.identity):
        return found
    if plan.replace_other:
        structlog.get_logger().warning("replacing what is on the SSD", part="ssd", path=str(plan.data_path), held=_held(found))
        return None
    raise ConfigError(
        f"{plan.data_path} holds {_held(found)}, expected blocks of {plan.slot_bytes} bytes of {plan.identity!r} "
        f"(version {VERSION}); name another directory, or have it replaced"
    )


def _meaning(superblock: Superblock) -> tuple[int, str]:
    return superblock.slot_bytes, superblock.identity


def _held(found: Superblock | None) -> str:
    if found is None:
        return "something else, or its first page is damaged"
    return f"blocks of {found.slot_bytes} bytes of {found.identity!r} (version {found.version})"


def _made(plan: SsdPlan, ops: FileOps, data_fd: int, table_fd: int) -> Superblock:
    """Write both files anew, the first page of the data last: until it is there, the next start begins again."""
    superblock = Superblock(secrets.token_bytes(FILE_ID_BYTES), plan.slot_bytes, plan.identity)
    os.ftruncate(data_fd, 0)
    os.ftruncate(table_fd, 0)
    try:
        _resize(plan, ops, data_fd, table_fd)
    except (ConfigError, OSError):
        plan.data_path.unlink()
        plan.table_path.unlink()
        raise
    for fd in (table_fd, data_fd):
        write_whole(ops, fd, [memoryview(superblock.packed())], 0)
        ops.sync(fd)
    _sync_directory(plan.directory)
    return superblock


def _resize(plan: SsdPlan, ops: FileOps, data_fd: int, table_fd: int) -> None:
    """Make both files as long as wanted: what is in places that stay is kept."""
    _reserve(plan, ops, table_fd, table_file_bytes(plan.num_slots))
    _reserve(plan, ops, data_fd, data_file_bytes(plan.num_slots, plan.slot_bytes))


def _reserve(plan: SsdPlan, ops: FileOps, fd: int, num_bytes: int) -> None:
    before = os.fstat(fd)
    if before.st_size > num_bytes:
        os.ftruncate(fd, num_bytes)
    disk = os.statvfs(plan.directory)
    missing, available = num_bytes - before.st_blocks * 512, disk.f_bavail * disk.f_frsize
    refusal = f"SSD tier in {plan.directory} needs {format_size(missing)} more, {format_size(available)} are free; lower --ssd"
    if missing > available:
        raise ConfigError(refusal)
    try:
        ops.allocate(fd, num_bytes)
    except OSError as error:
        os.ftruncate(fd, min(before.st_size, num_bytes))  # what was got before the disk was full
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConfigError(refusal) from error
        raise


def _mend_table(plan: SsdPlan, ops: FileOps, table_fd: int, superblock: Superblock) -> None:
    """A table that is not this data's tells nothing: then the tier starts empty."""
    found = read_superblock(_first_page(ops, table_fd))
    if found is not None and found.file_id == superblock.file_id:
        return
    log = structlog.get_logger().bind(part="ssd")
    log.warning("the SSD's table is lost or of another file; its blocks are forgotten", path=str(plan.table_path))
    os.ftruncate(table_fd, 0)
    _reserve(plan, ops, table_fd, table_file_bytes(plan.num_slots))
    write_whole(ops, table_fd, [memoryview(superblock.packed())], 0)
    ops.sync(table_fd)


def _records(ops: FileOps, table_fd: int, file_id: bytes, num_slots: int) -> list[Record | None]:
    records: list[Record | None] = []
    for first in range(0, num_slots, TABLE_CHUNK):
        raw = bytearray(min(TABLE_CHUNK, num_slots - first) * RECORD_BYTES)
        read_whole(ops, table_fd, [memoryview(raw)], record_offset(first))
        records += read_records(bytes(raw), file_id, first)
    return records


def _direct(plan: SsdPlan, ops: FileOps, undo: ExitStack) -> int | None:
    """A second descriptor of the data that bypasses the page cache; None where the file system has no such thing."""
    try:
        fd = ops.open(plan.data_path, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    try:
        read_whole(ops, fd, [aligned(PAGE_BYTES).data], 0, unit=PAGE_BYTES)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EINVAL:  # pages are too small for it
            return None
        raise
    undo.callback(os.close, fd)
    return fd


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
