"""What a place keeps, over closing and opening, and what it refuses to give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvasir.core.errors import PoolError
from kvasir.core.pool_events import SsdBlock
from kvasir.store.arena import create_arena
from kvasir.store.ssd import SsdFile, SsdOutcome, SsdRead, SsdWrite
from kvasir.store.ssd.buffers import aligned, pieces_to_read, views_to_write
from kvasir.store.ssd.layout import DATA_NAME, DATA_START, RECORD_BYTES, TABLE_NAME, record_offset
from tests.store.ssd.blocks import SLOT_BYTES, block_of, key_of, opened

OK, ABSENT, CORRUPT = SsdOutcome.OK, SsdOutcome.ABSENT, SsdOutcome.CORRUPT


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def ssd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SsdFile]:
    with opened(tmp_path, try_direct=request.param) as file:
        if request.param and not file.is_direct:
            pytest.skip("the file system of the temporary directory has no direct I/O")
        yield file


def read_back(ssd: SsdFile, place: int, number: int) -> bytes | None:
    into = aligned(ssd.slot_bytes)
    return into.tobytes() if ssd.read(place, key_of(number), into) is OK else None


def test_what_was_written_is_read(ssd: SsdFile) -> None:
    assert ssd.write(3, key_of(1), 7, block_of(1)) is OK
    assert read_back(ssd, 3, 1) == block_of(1).tobytes()


def test_a_place_that_holds_another_block_or_none_is_absent(ssd: SsdFile) -> None:
    ssd.write(3, key_of(1), 0, block_of(1))
    assert ssd.read(3, key_of(2), aligned(SLOT_BYTES)) is ABSENT
    assert ssd.read(4, key_of(1), aligned(SLOT_BYTES)) is ABSENT


def test_overwriting_leaves_the_newer_block_only(ssd: SsdFile) -> None:
    ssd.write(3, key_of(1), 0, block_of(1))
    ssd.write(3, key_of(2), 0, block_of(2))
    assert read_back(ssd, 3, 1) is None
    assert read_back(ssd, 3, 2) == block_of(2).tobytes()


def test_a_batch_in_any_order_and_with_holes_is_answered_in_its_own_order(ssd: SsdFile) -> None:
    places = [6, 1, 2, 3, 0, 7]
    assert ssd.write_many([SsdWrite(p, key_of(p), p, block_of(p)) for p in places]) == [OK] * 6
    targets = {p: aligned(SLOT_BYTES) for p in [*places, 5]}
    outcomes = ssd.read_many([SsdRead(p, key_of(p), into) for p, into in targets.items()])
    assert outcomes == [OK] * 6 + [ABSENT]
    assert all(np.array_equal(targets[p], block_of(p)) for p in places)


@pytest.mark.parametrize("slot_bytes", [1, 4095, 4096, 5000, 12_289])
@pytest.mark.parametrize("shift", [0, 1])
def test_any_size_and_any_memory_is_taken(tmp_path: Path, slot_bytes: int, shift: int) -> None:
    memory, target = block_of(5, slot_bytes + 1), aligned(slot_bytes + 3)
    block, into = memory[shift : shift + slot_bytes], target[shift : shift + slot_bytes]
    with opened(tmp_path, slot_bytes=slot_bytes) as ssd:
        assert ssd.write_many([SsdWrite(p, key_of(p), 0, block) for p in (2, 3)]) == [OK, OK]
        assert ssd.read(3, key_of(3), into) is OK
    assert np.array_equal(into, block)
    assert not target[:shift].any(), "nothing before the target was touched"
    assert not target[shift + slot_bytes :].any(), "nor after it"


@pytest.mark.parametrize("shift", [0, 1])
def test_a_block_that_nobody_may_write_to_is_written(ssd: SsdFile, shift: int) -> None:
    memory = block_of(5, SLOT_BYTES + 1)
    memory.flags.writeable = False
    block = memory[shift : shift + SLOT_BYTES]
    assert ssd.write(3, key_of(5), 0, block) is OK
    assert read_back(ssd, 3, 5) == block.tobytes()
    (view,) = views_to_write(block)
    assert np.shares_memory(np.frombuffer(view, dtype=np.uint8), block) == (shift == 0), "what lies on a page is not copied"


def test_slots_of_an_arena_are_never_copied() -> None:
    arena = create_arena(num_slots=2, slot_bytes=8192)
    pieces = pieces_to_read(arena.slot(1))
    assert pieces.borrowed is None
    for view in (*views_to_write(arena.slot(1)), *pieces.views):
        assert np.shares_memory(np.frombuffer(view, dtype=np.uint8), arena.slot(1))
    arena.close()


def test_what_was_written_is_found_at_the_next_start_oldest_first(tmp_path: Path) -> None:
    with opened(tmp_path) as ssd:
        for place, number in [(5, 1), (0, 2), (3, 3), (5, 4)]:
            ssd.write(place, key_of(number), number * 10, block_of(number))
    with opened(tmp_path) as ssd:
        assert ssd.recover() == [SsdBlock(key_of(2), 0, 20), SsdBlock(key_of(3), 3, 30), SsdBlock(key_of(4), 5, 40)]
        assert read_back(ssd, 5, 4) == block_of(4).tobytes()
        ssd.write(1, key_of(5), 50, block_of(5))
    with opened(tmp_path) as ssd:
        assert [block.ssd_slot for block in ssd.recover()] == [0, 3, 5, 1], "the order goes on where it ended"


def test_of_a_block_in_two_places_the_last_copy_is_found(tmp_path: Path) -> None:
    with opened(tmp_path) as ssd:
        for place in (4, 2):
            ssd.write(place, key_of(1), place, block_of(1))
    with opened(tmp_path) as ssd:
        assert ssd.recover() == [SsdBlock(key_of(1), 2, 2)]
        ssd.forget([2])
    with opened(tmp_path) as ssd:
        assert ssd.recover() == [], "and the older one does not come back when it is gone"


def test_what_is_forgotten_is_not_found_again(tmp_path: Path) -> None:
    with opened(tmp_path) as ssd:
        ssd.write_many([SsdWrite(p, key_of(p), 0, block_of(p)) for p in range(3)])
        ssd.forget([0, 2, 7])
        assert read_back(ssd, 0, 0) is None
    with opened(tmp_path) as ssd:
        assert [block.ssd_slot for block in ssd.recover()] == [1]


@pytest.mark.parametrize("offset", [0, 4096, SLOT_BYTES - 1])
def test_a_changed_byte_is_noticed_at_the_read_and_the_block_is_gone(tmp_path: Path, offset: int) -> None:
    with opened(tmp_path) as ssd:
        ssd.write(2, key_of(1), 0, block_of(1))
    change(tmp_path / DATA_NAME, DATA_START + 2 * SLOT_BYTES + offset)
    with opened(tmp_path) as ssd:
        assert ssd.read(2, key_of(1), aligned(SLOT_BYTES)) is CORRUPT
        assert ssd.read(2, key_of(1), aligned(SLOT_BYTES)) is ABSENT
    with opened(tmp_path) as ssd:
        assert ssd.recover() == []


@pytest.mark.parametrize("offset", range(RECORD_BYTES))
def test_a_changed_byte_of_a_record_empties_its_place_only(tmp_path: Path, offset: int) -> None:
    with opened(tmp_path) as ssd:
        ssd.write_many([SsdWrite(p, key_of(p), 0, block_of(p)) for p in (1, 2)])
    change(tmp_path / TABLE_NAME, record_offset(1) + offset)
    with opened(tmp_path) as ssd:
        assert [block.ssd_slot for block in ssd.recover()] == [2]
        assert read_back(ssd, 2, 2) == block_of(2).tobytes()


def test_bytes_of_another_place_are_corrupt_and_a_record_of_another_place_is_none(tmp_path: Path) -> None:
    with opened(tmp_path) as ssd:
        ssd.write_many([SsdWrite(p, key_of(p), 0, block_of(p)) for p in (1, 2)])
    copy(tmp_path / DATA_NAME, DATA_START + SLOT_BYTES, DATA_START + 2 * SLOT_BYTES, SLOT_BYTES)
    copy(tmp_path / TABLE_NAME, record_offset(1), record_offset(5), RECORD_BYTES)
    with opened(tmp_path) as ssd:
        assert [block.ssd_slot for block in ssd.recover()] == [1, 2]
        assert ssd.read(2, key_of(2), aligned(SLOT_BYTES)) is CORRUPT


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SsdWrite(8, key_of(1), 0, block_of(1)), r"ssd slot 8 does not exist; there are 8"),
        (SsdWrite(-1, key_of(1), 0, block_of(1)), r"ssd slot -1 does not exist"),
        (SsdWrite(0, b"short", 0, block_of(1)), r"key of 5 bytes, expected 16"),
        (SsdWrite(0, key_of(1), -1, block_of(1)), r"depth -1"),
        (SsdWrite(0, key_of(1), 0, block_of(1)[:-1]), r"12287 bytes.*expected 12288"),
        (SsdWrite(0, key_of(1), 0, block_of(1, 2 * SLOT_BYTES)[::2]), r"contiguous"),
        (SsdWrite(0, key_of(1), 0, block_of(1).reshape(2, -1)), r"2 dimensions"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(ssd: SsdFile, request_: SsdWrite, message: str) -> None:
    with pytest.raises(PoolError, match=message):
        ssd.write_many([SsdWrite(1, key_of(9), 0, block_of(9)), request_])
    assert ssd.recover() == []


def test_a_place_named_twice_and_a_target_that_cannot_be_written_are_refused(ssd: SsdFile) -> None:
    write = SsdWrite(1, key_of(1), 0, block_of(1))
    with pytest.raises(PoolError, match="name a place twice"):
        ssd.write_many([write, write])
    target = aligned(SLOT_BYTES)
    target.flags.writeable = False
    with pytest.raises(PoolError, match="cannot be written"):
        ssd.read(1, key_of(1), target)


def test_a_closed_file_refuses_and_can_be_closed_again(tmp_path: Path) -> None:
    ssd = opened(tmp_path)
    ssd.close()
    ssd.close()
    with pytest.raises(PoolError, match="closed"):
        ssd.write(0, key_of(1), 0, block_of(1))


def test_without_direct_io_it_says_so(tmp_path: Path) -> None:
    with opened(tmp_path, try_direct=False) as ssd:
        assert not ssd.is_direct


def change(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def copy(path: Path, source: int, target: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(source)
        raw = file.read(length)
        file.seek(target)
        file.write(raw)
