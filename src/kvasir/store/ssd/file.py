"""The SSD tier's bytes: equal places in one preallocated file, written and read straight from and to the arena.

**A read never returns wrong bytes.** What is in a place is proven by its record: the key that is asked for must be the
record's, and so must be the checksum over what was read. So nothing has to reach the disk in order, nothing is flushed, and
neither a kill at any moment nor a power cut can do worse than lose blocks:

    write: the data, direct ─▶ the record     a kill between: the older record stays, and its checksum fails at the read
    power cut: any sectors of the last seconds are missing: a checksum fails, or the block is not in the table
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from kvasir.core.errors import PoolError
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import SsdBlock
from kvasir.store.arena import PAGE_BYTES
from kvasir.store.ssd.buffers import Bytes, pieces_to_read, views_to_write
from kvasir.store.ssd.file_ops import FileOps, SystemFiles, read_whole, write_whole
from kvasir.store.ssd.layout import EMPTY_RECORD, Record, data_check_of, place_bytes, place_offset, record_offset
from kvasir.store.ssd.opening import SsdFiles, SsdPlan, open_files
from kvasir.store.ssd.requests import SsdOutcome, SsdRead, SsdWrite, is_run, require_valid, runs

MAX_RUN = 256
"""Places in one system call: two buffers each, of the 1024 that the kernel takes."""


def open_ssd(
    directory: Path | str,
    *,
    num_slots: int,
    slot_bytes: int,
    identity: str,
    replace_other: bool = False,
    try_direct: bool = True,
    ops: FileOps | None = None,
) -> SsdFile:
    """Open the tier that is in this directory, or make it; then nobody else can until it is closed or its process ends.

    `identity` names model, dtype, layout and tokens of a block. `num_slots` may differ from the last time: places that
    there are in both keep their blocks. Raises ConfigError: no directory, no right to write, in use, disk too small, or
    files of another identity or version unless `replace_other`.
    """
    plan = SsdPlan(Path(directory), num_slots, slot_bytes, identity, replace_other)
    system = ops if ops is not None else SystemFiles()
    ssd = SsdFile(open_files(plan, system, try_direct=try_direct), plan, system)
    log = structlog.get_logger().bind(part="ssd")
    log.info("SSD open", path=str(plan.data_path), slots=num_slots, found=len(ssd.recover()), is_direct=ssd.is_direct)
    if not ssd.is_direct:
        log.warning("no direct I/O here: the SSD goes through the page cache and is slower", path=str(plan.data_path))
    return ssd


class SsdFile:
    """Blocks in places; every method may be called from any thread, and blocks it.

    One place is used by one write, or by any reads, at a time: who breaks this finds the block corrupt, never wrong.
    `is_direct` says whether the page cache is bypassed; `errors` counts what the operating system said, by its name.
    """

    def __init__(self, files: SsdFiles, plan: SsdPlan, ops: FileOps):
        self.num_slots = plan.num_slots
        self.slot_bytes = plan.slot_bytes
        self.is_direct = files.is_direct
        self.errors: Counter[str] = Counter()
        self._log = structlog.get_logger().bind(part="ssd")
        self._files = files
        self._ops = ops
        self._records = files.records
        last = max((record.sequence for record in self._records if record is not None), default=0)
        self._sequence = itertools.count(last + 1)
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False
        self.forget(_older_copies(files.records))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """No new operation from now on; the files are closed by the last that is under way. May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if not self._users:
                self._files.close()

    def recover(self) -> list[SsdBlock]:
        """What can be read, oldest write first. Only the table was looked at: the bytes are verified when they are read."""
        held = [(record.sequence, place, record) for place, record in enumerate(self._records) if record is not None]
        return [SsdBlock(record.key, place, record.depth) for _, place, record in sorted(held, key=lambda h: h[0])]

    def write(self, ssd_slot: int, key: BlockKey, depth: int, data: Bytes) -> SsdOutcome:
        """`ok` or `failed`; see SsdWrite."""
        return self.write_many([SsdWrite(ssd_slot, key, depth, data)])[0]

    def read(self, ssd_slot: int, key: BlockKey, into: Bytes) -> SsdOutcome:
        """`ok`, `absent`, `corrupt` or `failed`; see SsdRead."""
        return self.read_many([SsdRead(ssd_slot, key, into)])[0]

    def write_many(self, writes: Sequence[SsdWrite]) -> list[SsdOutcome]:
        """One outcome for each; neighbouring places go out in one system call. Raises PoolError for what makes no sense."""
        self.require_valid(writes)
        return self.write_valid(writes)

    def read_many(self, reads: Sequence[SsdRead]) -> list[SsdOutcome]:
        """One outcome for each; neighbouring places come in one system call. Raises PoolError for what makes no sense."""
        self.require_valid(reads)
        return self.read_valid(reads)

    def write_valid(self, writes: Sequence[SsdWrite]) -> list[SsdOutcome]:
        """`write_many` of different places that `require_valid` has seen."""
        outcomes: dict[int, SsdOutcome] = {}
        with self._in_use():
            if is_run(writes, MAX_RUN):
                return self._write_run(writes)
            for run in runs(writes, MAX_RUN):
                outcomes.update(zip([w.ssd_slot for w in run], self._write_run(run), strict=True))
        return [outcomes[write.ssd_slot] for write in writes]

    def read_valid(self, reads: Sequence[SsdRead]) -> list[SsdOutcome]:
        """`read_many` of different places that `require_valid` has seen."""
        expected = {read.ssd_slot: record for read in reads if (record := self._record_of(read)) is not None}
        outcomes = {read.ssd_slot: SsdOutcome.ABSENT for read in reads}
        with self._in_use():
            for run in runs([read for read in reads if read.ssd_slot in expected], MAX_RUN):
                outcomes.update(zip([read.ssd_slot for read in run], self._read_run(run, expected), strict=True))
        return [outcomes[read.ssd_slot] for read in reads]

    def forget(self, ssd_slots: Sequence[int]) -> None:
        """Empty these places, also for the next start."""
        with self._in_use():
            places = sorted(set(ssd_slots))
            for _, neighbours in itertools.groupby(enumerate(places), lambda numbered: numbered[1] - numbered[0]):
                run = [place for _, place in neighbours]
                self._erase(run[0], len(run))

    def require_valid(self, requests: Sequence[SsdWrite] | Sequence[SsdRead]) -> None:
        """Raises PoolError when a place, a key or a buffer cannot be right."""
        require_valid(requests, num_slots=self.num_slots, slot_bytes=self.slot_bytes)

    # --- writing -----------------------------------------------------------------------------------------------

    def _write_run(self, run: Sequence[SsdWrite]) -> list[SsdOutcome]:
        """Neighbours fail alone: after an error each is tried by itself."""
        try:
            self._try_write(run)
        except OSError as error:
            if len(run) > 1:
                return [outcome for write in run for outcome in self._write_run([write])]
            self._note(error, "write", run[0].ssd_slot)
            self._erase(run[0].ssd_slot)
            return [SsdOutcome.FAILED]
        return [SsdOutcome.OK] * len(run)

    def _try_write(self, run: Sequence[SsdWrite]) -> None:
        first = run[0].ssd_slot
        self._records[first : first + len(run)] = [None] * len(run)
        views = [view for write in run for view in views_to_write(write.data)]
        records = [Record(w.key, next(self._sequence), data_check_of(w.data), w.depth) for w in run]
        write_whole(self._ops, self._files.data_fd, views, self._offset(first), unit=self._unit)
        if not self.is_direct:
            self._ops.sync(self._files.data_fd)  # or the page cache would hold what the arena holds, up to its limit
        self._forget_pages(run)
        self._write_records(first, [r.packed(self._files.file_id, first + i) for i, r in enumerate(records)])
        self._records[first : first + len(run)] = records

    def _write_records(self, first: int, packed: Sequence[bytes]) -> None:
        write_whole(self._ops, self._files.table_fd, [memoryview(b"".join(packed))], record_offset(first))

    # --- reading -----------------------------------------------------------------------------------------------

    def _record_of(self, read: SsdRead) -> Record | None:
        record = self._records[read.ssd_slot]
        return record if record is not None and record.key == read.key else None

    def _read_run(self, run: Sequence[SsdRead], expected: dict[int, Record]) -> list[SsdOutcome]:
        """As `_write_run`."""
        pieces = [pieces_to_read(read.into) for read in run]
        try:
            views = [view for piece in pieces for view in piece.views]
            read_whole(self._ops, self._files.data_fd, views, self._offset(run[0].ssd_slot), unit=self._unit)
        except OSError as error:
            if len(run) > 1:
                return [outcome for read in run for outcome in self._read_run([read], expected)]
            self._note(error, "read", run[0].ssd_slot)
            return [SsdOutcome.FAILED]
        self._forget_pages(run)
        for read, piece in zip(run, pieces, strict=True):
            piece.give_back_to(read.into)
        return [self._verdict(read, expected[read.ssd_slot]) for read in run]

    def _verdict(self, read: SsdRead, record: Record) -> SsdOutcome:
        if data_check_of(read.into) == record.data_check:
            return SsdOutcome.OK
        if self._records[read.ssd_slot] is record:  # else a write came between, which the caller should not have let
            self._erase(read.ssd_slot)
        self._log.warning("a block on the SSD is corrupt and dropped", ssd_slot=read.ssd_slot, key=read.key.hex())
        return SsdOutcome.CORRUPT

    # --- both --------------------------------------------------------------------------------------------------

    def _erase(self, first: int, number: int = 1) -> None:
        self._records[first : first + number] = [None] * number
        try:
            self._write_records(first, [EMPTY_RECORD] * number)
        except OSError as error:
            self._note(error, "erase", first)

    @property
    def _unit(self) -> int:
        return PAGE_BYTES if self.is_direct else 1

    def _offset(self, place: int) -> int:
        return place_offset(place, self.slot_bytes)

    def _forget_pages(self, run: Sequence[SsdWrite] | Sequence[SsdRead]) -> None:
        """Without direct I/O, do not let the page cache keep a second copy of what the arena holds."""
        if not self.is_direct:
            length = len(run) * place_bytes(self.slot_bytes)
            os.posix_fadvise(self._files.data_fd, self._offset(run[0].ssd_slot), length, os.POSIX_FADV_DONTNEED)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """The descriptors stay open within: a number that was closed may by now be another file."""
        with self._lock:
            if self._closed:
                raise PoolError("the SSD is closed")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._closed and not self._users:
                    self._files.close()

    def _note(self, error: OSError, what: str, place: int) -> None:
        """Count it, and log the first, the second, the fourth…: a dead disk must not fill another with logs."""
        name = errno.errorcode.get(error.errno or 0, "unknown")
        with self._lock:
            self.errors[name] += 1
            count = self.errors[name]
        if count & (count - 1) == 0:
            self._log.warning("SSD error", operation=what, ssd_slot=place, error=name, count=count)


def _older_copies(records: Sequence[Record | None]) -> list[int]:
    """A block that was dropped and written again elsewhere may be in the table twice; the last copy counts."""
    newest: dict[BlockKey, int] = {}
    for place, record in enumerate(records):
        if record is None:
            continue
        other = newest.get(record.key)
        rival = records[other] if other is not None else None
        if rival is None or rival.sequence < record.sequence:
            newest[record.key] = place
    keep = set(newest.values())
    return [place for place, record in enumerate(records) if record is not None and place not in keep]
