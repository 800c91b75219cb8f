"""A disk that fails: neighbours of a bad block are saved, errors are counted, nothing wrong comes back."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kvasir.store.ssd import SsdOutcome, SsdRead, SsdWrite
from kvasir.store.ssd.buffers import aligned
from kvasir.store.ssd.faulty import FaultPlan, FaultyFiles
from kvasir.store.ssd.file_ops import SystemFiles, read_whole, write_whole
from kvasir.store.ssd.layout import place_offset
from tests.store.ssd.blocks import SLOT_BYTES, block_of, key_of, opened

OK, FAILED, CORRUPT, ABSENT = SsdOutcome.OK, SsdOutcome.FAILED, SsdOutcome.CORRUPT, SsdOutcome.ABSENT


class BadPlace(SystemFiles):
    """Whatever touches one place fails."""

    def __init__(self, place: int, code: int):
        self._first, self._code = place_offset(place, SLOT_BYTES), code

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._refuse(buffers, offset)
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._refuse(buffers, offset)
        return super().pwritev(fd, buffers, offset)

    def _refuse(self, buffers: Sequence[memoryview], offset: int) -> None:
        if offset < self._first + SLOT_BYTES and offset + sum(b.nbytes for b in buffers) > self._first:
            raise OSError(self._code, "injected")


def test_one_bad_place_does_not_take_its_neighbours_along(tmp_path: Path) -> None:
    places = range(6)
    with opened(tmp_path) as ssd:
        ssd.write_many([SsdWrite(p, key_of(p), 0, block_of(p)) for p in places])
    with opened(tmp_path, ops=BadPlace(2, errno.EIO)) as ssd:
        targets = [aligned(SLOT_BYTES) for _ in places]
        outcomes = ssd.read_many([SsdRead(p, key_of(p), targets[p]) for p in places])
        assert outcomes == [OK, OK, FAILED, OK, OK, OK]
        assert all(np.array_equal(targets[p], block_of(p)) for p in places if p != 2)
        outcomes = ssd.write_many([SsdWrite(p, key_of(p + 10), 0, block_of(p + 10)) for p in places])
        assert outcomes == [OK, OK, FAILED, OK, OK, OK]
        assert ssd.errors == {"EIO": 2}
        assert [block.ssd_slot for block in ssd.recover()] == [0, 1, 3, 4, 5], "a write that failed leaves its place empty"


@pytest.mark.parametrize(
    ("plan", "error"),
    [(FaultPlan(write_error=1.0), "EIO"), (FaultPlan(no_space=1.0), "ENOSPC"), (FaultPlan(read_only=1.0), "EROFS")],
)
def test_a_write_that_fails_says_so_and_the_older_block_is_not_claimed(tmp_path: Path, plan: FaultPlan, error: str) -> None:
    faulty = FaultyFiles(1)
    with opened(tmp_path, ops=faulty) as ssd:
        ssd.write(1, key_of(1), 0, block_of(1))
        faulty.plan = plan
        assert ssd.write(1, key_of(2), 0, block_of(2)) is FAILED
        faulty.plan = FaultPlan()
        assert ssd.errors[error] == 2, "the data, and the record that was to be erased"
        assert ssd.read(1, key_of(1), aligned(SLOT_BYTES)) is ABSENT
        assert ssd.read(1, key_of(2), aligned(SLOT_BYTES)) is ABSENT
        assert ssd.write(1, key_of(3), 0, block_of(3)) is OK, "it is well again"


@pytest.mark.parametrize("plan", [FaultPlan(torn_write=1.0), FaultPlan(flip_on_write=1.0)])
def test_a_write_that_lied_is_found_out_at_the_read(tmp_path: Path, plan: FaultPlan) -> None:
    faulty = FaultyFiles(3)
    with opened(tmp_path, ops=faulty) as ssd:
        ssd.write(1, key_of(1), 0, block_of(1))
        faulty.plan = plan
        assert ssd.write(1, key_of(1), 0, block_of(2)) is OK
        faulty.plan = FaultPlan()
        assert ssd.read(1, key_of(1), aligned(SLOT_BYTES)) is CORRUPT
    assert sum(faulty.happened.values()) >= 1


def test_a_bit_that_flips_on_its_way_from_the_disk_is_found_out(tmp_path: Path) -> None:
    faulty = FaultyFiles(3)
    with opened(tmp_path, ops=faulty) as ssd:
        ssd.write(1, key_of(1), 0, block_of(1))
        faulty.plan = FaultPlan(flip_on_read=1.0)
        assert ssd.read(1, key_of(1), aligned(SLOT_BYTES)) is CORRUPT


def test_short_reads_and_writes_are_continued_where_they_stopped(tmp_path: Path) -> None:
    faulty = FaultyFiles(5)
    size = 64 * 4096
    with opened(tmp_path, slot_bytes=size, ops=faulty) as ssd:
        faulty.plan = FaultPlan(short_read=0.7, short_write=0.7)
        good = 0
        for number in range(20):
            into = aligned(size)
            if ssd.write(1, key_of(number), 0, block_of(number, size)) is OK and ssd.read(1, key_of(number), into) is OK:
                assert np.array_equal(into, block_of(number, size))
                good += 1
    assert good > 0
    assert faulty.happened["short_read"] > 0
    assert faulty.happened["short_write"] > 0


def test_the_end_of_a_file_is_an_error_and_not_an_endless_loop(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        write_whole(SystemFiles(), file.fileno(), [memoryview(b"ab"), memoryview(b"c")], 0)
        with pytest.raises(OSError, match="nothing more was moved"):
            read_whole(SystemFiles(), file.fileno(), [memoryview(bytearray(4))], 0)


def test_closing_waits_for_nobody_and_cuts_off_nobody(tmp_path: Path) -> None:
    """A descriptor that is closed under a write would be somebody else's file by the time the write goes on."""
    faulty = FaultyFiles(1)
    ssd = opened(tmp_path, ops=faulty)
    faulty.plan = FaultPlan(stall=1.0)
    outcomes: list[SsdOutcome] = []
    writer = threading.Thread(target=lambda: outcomes.append(ssd.write(1, key_of(1), 0, block_of(1))))
    writer.start()
    while not faulty.happened["stall"]:
        writer.join(0.001)
    ssd.close()
    faulty.release()
    writer.join(20)
    assert outcomes == [OK]
    with opened(tmp_path) as ssd:
        assert len(ssd.recover()) == 1


def test_the_same_seed_makes_the_same_faults(tmp_path: Path) -> None:
    def run(name: str) -> list[SsdOutcome]:
        (tmp_path / name).mkdir()
        faulty = FaultyFiles(11)
        with opened(tmp_path / name, ops=faulty) as ssd:
            faulty.plan = FaultPlan(write_error=0.3, torn_write=0.2)
            return [ssd.write(0, key_of(n), 0, block_of(n)) for n in range(30)]

    first = run("a")
    assert first == run("b")
    assert {OK, FAILED} <= set(first)
