"""Which files are taken over, which are refused and with what words, and that a refusal leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvasir.core.errors import ConfigError
from kvasir.store.arena import PAGE_BYTES
from kvasir.store.ssd import SsdOutcome, SsdWrite, places_that_fit
from kvasir.store.ssd.buffers import aligned
from kvasir.store.ssd.faulty import FaultPlan, FaultyFiles
from kvasir.store.ssd.file_ops import SystemFiles
from kvasir.store.ssd.layout import DATA_NAME, TABLE_NAME, Superblock, data_file_bytes, read_superblock, table_file_bytes
from tests.store.ssd.blocks import IDENTITY, SLOT_BYTES, block_of, key_of, opened

HOLDER = """
import sys
from collections.abc import Sequence
from pathlib import Path
from tests.store.ssd.blocks import opened
ssd = opened(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
"""


def filled(directory: Path, num_slots: int = 8) -> None:
    with opened(directory, num_slots=num_slots) as ssd:
        ssd.write_many([SsdWrite(p, key_of(p), p, block_of(p)) for p in range(num_slots)])


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_disk_is_taken_at_the_start_and_not_block_by_block(tmp_path: Path) -> None:
    with opened(tmp_path, num_slots=100):
        blocks = os.stat(tmp_path / DATA_NAME).st_blocks * 512
    assert blocks >= data_file_bytes(100, SLOT_BYTES)
    assert names(tmp_path) == {DATA_NAME, TABLE_NAME}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}, "KVCache is its owner's"


@pytest.mark.parametrize("slot_bytes", [1, 4096, 5000, 1 << 20])
def test_places_that_fit_do_fit_and_one_more_would_not(slot_bytes: int) -> None:
    num_slots = places_that_fit(64 << 20, slot_bytes)
    assert data_file_bytes(num_slots, slot_bytes) + table_file_bytes(num_slots) <= 64 << 20
    assert data_file_bytes(num_slots + 1, slot_bytes) + table_file_bytes(num_slots + 1) > 64 << 20
    assert places_that_fit(1000, slot_bytes) == 0


def test_a_grown_tier_keeps_all(tmp_path: Path) -> None:
    filled(tmp_path, 4)
    with opened(tmp_path, num_slots=10) as ssd:
        assert [block.ssd_slot for block in ssd.recover()] == [0, 1, 2, 3]
        assert ssd.write(9, key_of(9), 0, block_of(9)) is SsdOutcome.OK
        assert ssd.read(3, key_of(3), aligned(SLOT_BYTES)) is SsdOutcome.OK


def test_a_shrunk_tier_keeps_the_places_that_are_left_and_gives_the_disk_back(tmp_path: Path) -> None:
    filled(tmp_path, 8)
    with opened(tmp_path, num_slots=3) as ssd:
        assert [block.ssd_slot for block in ssd.recover()] == [0, 1, 2]
        assert ssd.read(2, key_of(2), aligned(SLOT_BYTES)) is SsdOutcome.OK
    assert (tmp_path / DATA_NAME).stat().st_size == data_file_bytes(3, SLOT_BYTES)
    with opened(tmp_path, num_slots=8) as ssd:
        assert [block.ssd_slot for block in ssd.recover()] == [0, 1, 2], "what was cut off does not come back"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"identity": "other model"},
            rf"holds blocks of {SLOT_BYTES} bytes of '{IDENTITY}'.*expected.*'other model'.*replaced",
        ),
        ({"slot_bytes": 4096}, rf"holds blocks of {SLOT_BYTES} bytes.*expected blocks of 4096 bytes.*name another directory"),
    ],
)
def test_what_another_kind_of_block_left_is_kept_unless_it_is_to_be_replaced(
    tmp_path: Path, other: dict[str, str | int], message: str
) -> None:
    filled(tmp_path)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, **other)  # type: ignore[arg-type]
    with opened(tmp_path) as ssd:
        assert len(ssd.recover()) == 8, "the refusal left it as it was"
    with opened(tmp_path, replace_other=True, **other) as ssd:  # type: ignore[arg-type]
        assert ssd.recover() == []


def test_to_be_allowed_to_replace_others_does_not_replace_one_s_own(tmp_path: Path) -> None:
    filled(tmp_path)
    with opened(tmp_path, replace_other=True) as ssd:
        assert len(ssd.recover()) == 8


def test_a_later_version_is_refused_by_its_number(tmp_path: Path) -> None:
    filled(tmp_path)
    with (tmp_path / DATA_NAME).open("r+b") as file:
        file.write(Superblock(bytes(16), SLOT_BYTES, IDENTITY, version=9).packed())
    with pytest.raises(ConfigError, match=r"\(version 9\), expected .* \(version 1\)"):
        opened(tmp_path)


@pytest.mark.parametrize("content", [b"somebody's diary", b"somebody's diary" * 1000])
def test_a_file_that_is_not_ours_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / DATA_NAME).write_bytes(content)
    with pytest.raises(ConfigError, match="holds something else, or its first page is damaged"):
        opened(tmp_path)
    assert (tmp_path / DATA_NAME).read_bytes() == content


@pytest.mark.parametrize("offset", [0, 9, 20, 40, 60, PAGE_BYTES - 1])
def test_a_damaged_first_page_is_noticed(offset: int) -> None:
    page = bytearray(Superblock(bytes(16), 4096, IDENTITY).packed())
    assert read_superblock(bytes(page)) == Superblock(bytes(16), 4096, IDENTITY)
    page[offset] ^= 1
    assert read_superblock(bytes(page)) is None


def test_a_making_that_was_cut_short_is_begun_again(tmp_path: Path) -> None:
    filled(tmp_path)
    with (tmp_path / DATA_NAME).open("r+b") as file:
        file.write(bytes(PAGE_BYTES))  # the first page is what is written last
    with opened(tmp_path) as ssd:
        assert ssd.recover() == []


@pytest.mark.parametrize("loss", ["missing", "empty", "of another file", "cut"])
def test_a_lost_table_means_an_empty_tier_and_no_failure(tmp_path: Path, loss: str) -> None:
    filled(tmp_path)
    table = tmp_path / TABLE_NAME
    match loss:
        case "missing":
            table.unlink()
        case "empty":
            table.write_bytes(b"")
        case "of another file":
            (tmp_path / "other").mkdir()
            filled(tmp_path / "other")
            table.write_bytes((tmp_path / "other" / TABLE_NAME).read_bytes())
        case "cut":
            os.truncate(table, 100)
    with opened(tmp_path) as ssd:
        assert ssd.recover() == []
        assert ssd.write(0, key_of(1), 0, block_of(1)) is SsdOutcome.OK
    with opened(tmp_path) as ssd:
        assert len(ssd.recover()) == 1


def test_two_processes_cannot_have_one_directory_and_the_second_may_when_the_first_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert any(line == "open\n" for line in holder.stdout)
        with pytest.raises(ConfigError, match=rf"{DATA_NAME} is in use by another process; give each node a directory"):
            opened(tmp_path)
        holder.kill()
        holder.wait(timeout=20)
    opened(tmp_path).close()


def test_nor_can_one_process_open_it_twice(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(ConfigError, match="in use"):
        opened(tmp_path)


def test_a_missing_directory_and_a_file_in_its_stead_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SSD directory .*/missing does not exist; make it"):
        opened(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"SSD directory .*/file is not a directory"):
        opened(tmp_path / "file")


def test_a_tier_larger_than_the_disk_is_refused_with_both_sizes_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs 1048576\.0 GiB more, .* GiB are free; lower --ssd"):
        opened(tmp_path, num_slots=1 << 20, slot_bytes=1 << 30)
    assert names(tmp_path) == set()


class FullDisk(SystemFiles):
    """Has room until the table is there, as when somebody else writes at the same time."""

    def allocate(self, fd: int, num_bytes: int) -> None:
        super().allocate(fd, num_bytes // 2)
        if num_bytes > 1 << 20:
            raise OSError(28, "No space left on device")
        super().allocate(fd, num_bytes)


def test_a_disk_that_fills_up_meanwhile_gets_back_what_was_taken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs .* more, .* are free"):
        opened(tmp_path, ops=FullDisk())
    assert names(tmp_path) == set()
    filled(tmp_path, 4)
    with pytest.raises(ConfigError, match=r"needs .* more, .* are free"):
        opened(tmp_path, num_slots=1000, ops=FullDisk())
    assert (tmp_path / DATA_NAME).stat().st_size == data_file_bytes(4, SLOT_BYTES)
    with opened(tmp_path, num_slots=4) as ssd:
        assert len(ssd.recover()) == 4


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (FaultPlan(read_only=1.0), "Read-only file system"),
        (FaultPlan(write_error=1.0), "Input/output error"),
        (FaultPlan(no_space=1.0), "lower --ssd"),
    ],
)
def test_a_sick_disk_is_a_clear_error_at_the_start(tmp_path: Path, plan: FaultPlan, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        opened(tmp_path, ops=FaultyFiles(1, plan))
    opened(tmp_path).close()


def test_a_table_that_cannot_be_read_is_a_clear_error(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot use SSD directory .*: Input/output error; name one"):
        opened(tmp_path, ops=FaultyFiles(1, FaultPlan(read_error=1.0)))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_directory_without_the_right_to_write_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="Permission denied"):
            opened(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("sizes", [(0, 4096), (1, 0), (-1, 5)])
def test_a_tier_of_nothing_is_refused(tmp_path: Path, sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="needs a place of a byte"):
        opened(tmp_path, num_slots=sizes[0], slot_bytes=sizes[1])


@pytest.mark.parametrize("identity", ["", "x" * 3000])
def test_an_identity_that_names_nothing_or_too_much_is_refused(tmp_path: Path, identity: str) -> None:
    with pytest.raises(ConfigError, match="identity of"):
        opened(tmp_path, identity=identity)


def test_descriptors_are_not_leaked_by_refusals(tmp_path: Path) -> None:
    filled(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ConfigError):
            opened(tmp_path, identity="other")
        with pytest.raises(ConfigError):
            opened(tmp_path, num_slots=1 << 40)
        opened(tmp_path).close()
    assert len(os.listdir("/proc/self/fd")) == before


class NoDirectIo(SystemFiles):
    """A file system without it refuses at opening or at the first read."""

    def __init__(self, *, at_open: bool):
        self._at_open = at_open
        self._direct: set[int] = set()

    def open(self, path: Path, flags: int) -> int:
        if flags & os.O_DIRECT and self._at_open:
            raise OSError(22, "Invalid argument")
        fd = super().open(path, flags)
        if flags & os.O_DIRECT:
            self._direct.add(fd)
        return fd

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fd in self._direct:
            raise OSError(22, "Invalid argument")
        return super().preadv(fd, buffers, offset)


@pytest.mark.parametrize("at_open", [True, False])
def test_where_there_is_no_direct_io_the_page_cache_is_used_and_it_is_visible(tmp_path: Path, at_open: bool) -> None:
    with opened(tmp_path, ops=NoDirectIo(at_open=at_open)) as ssd:
        assert not ssd.is_direct
        assert ssd.write(0, key_of(1), 0, block_of(1)) is SsdOutcome.OK
        assert ssd.read(0, key_of(1), aligned(SLOT_BYTES)) is SsdOutcome.OK
