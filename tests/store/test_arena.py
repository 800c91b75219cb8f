"""The arena, byte by byte, between two processes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from kvasir.core.errors import ClusterError, ConfigError
from kvasir.store import arena as arena_module
from kvasir.store.arena import PAGE_BYTES, Arena, create_arena, open_arena, slots_that_fit
from kvasir.store.prefault import CHUNK_BYTES, Prefault

OTHER_PROCESS = """
import sys, msgspec
from kvasir.store.arena import ArenaHandle, open_arena
arena = open_arena(msgspec.json.decode(sys.stdin.buffer.read(), type=ArenaHandle))
assert bytes(arena.slot(1)) == b"hello", bytes(arena.slot(1))
arena.slot(2)[:] = list(b"world")
arena.generations[2] += 1
"""


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = create_arena(num_slots=3, slot_bytes=5)
    yield arena
    arena.close()


def test_every_slot_starts_on_a_page(arena: Arena) -> None:
    assert arena.stride == PAGE_BYTES
    assert all(arena.slot(i).ctypes.data % PAGE_BYTES == 0 for i in range(3))
    assert arena.memory.nbytes == 3 * PAGE_BYTES
    assert [arena.slot(i).nbytes for i in range(3)] == [5, 5, 5]


def test_a_new_arena_is_zero(arena: Arena) -> None:
    assert not arena.memory.any()
    assert arena.generations.dtype == np.uint32
    assert arena.generations.tolist() == [0, 0, 0]


def test_slots_and_generations_do_not_overlap(arena: Arena) -> None:
    arena.memory[:] = 255
    assert arena.generations.tolist() == [0, 0, 0]
    arena.generations[:] = 7
    assert (arena.memory == 255).all()
    assert open_arena(arena.handle).generations.tolist() == [7, 7, 7], "nor with the header"


def test_two_processes_see_each_other_s_bytes(arena: Arena) -> None:
    arena.slot(1)[:] = list(b"hello")
    handle = msgspec.json.encode(arena.handle)
    subprocess.run([sys.executable, "-c", OTHER_PROCESS], input=handle, check=True, timeout=20)
    assert bytes(arena.slot(2)) == b"world"
    assert arena.generations.tolist() == [0, 0, 1]


def test_a_mapping_outlives_the_closing_of_the_arena() -> None:
    arena = create_arena(num_slots=3, slot_bytes=5)
    other = open_arena(arena.handle)
    arena.close()
    arena.slot(0)[0] = 9
    assert other.slot(0)[0] == 9


def test_nothing_of_it_has_a_name(arena: Arena) -> None:
    assert not [entry for entry in Path("/dev/shm").iterdir() if "kvasir" in entry.name]
    assert os.readlink(f"/proc/self/fd/{arena.handle.fd}").startswith("/memfd:kvasir-arena")


def test_an_arena_whose_process_is_gone_cannot_be_opened(arena: Arena) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(ClusterError, match=f"cannot open the arena of process {process.pid}"):
        open_arena(replace(arena.handle, pid=process.pid))


@pytest.mark.parametrize("change", [{"id": bytes(16)}, {"num_slots": 4}, {"slot_bytes": 6}, {"stride": 8192}])
def test_another_arena_than_the_announced_one_is_refused(arena: Arena, change: dict[str, int | bytes]) -> None:
    with pytest.raises(ClusterError, match="not the arena that was announced"):
        open_arena(replace(arena.handle, **change))


def test_a_file_that_is_no_arena_is_refused(arena: Arena, tmp_path: Path) -> None:
    with (tmp_path / "empty").open("w+") as file, pytest.raises(ClusterError, match="not the arena"):
        open_arena(replace(arena.handle, fd=file.fileno()))


def test_an_arena_larger_than_the_memory_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "memfd_create", lambda *_: pytest.fail("allocated before it was checked"))
    with pytest.raises(ConfigError, match=r"arena of 1048576\.0 GiB does not fit: .* GiB free memory; lower --dram"):
        create_arena(1 << 20, 1 << 30)


@pytest.mark.parametrize("sizes", [(0, 4096), (1, 0), (-1, 5)])
def test_an_arena_of_nothing_is_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="at least one slot"):
        create_arena(*sizes)


@pytest.mark.parametrize("slot_bytes", [1, 4096, 4097, 1_000_000])
def test_slots_that_fit_do_fit_and_one_more_would_not(slot_bytes: int) -> None:
    dram = 64 << 20
    num_slots = slots_that_fit(dram, slot_bytes)
    arena = create_arena(num_slots, slot_bytes)
    size = os.fstat(arena.handle.fd).st_size
    arena.close()
    assert dram - arena.stride - 2 * PAGE_BYTES < size <= dram


def test_the_tightest_control_group_counts_and_its_file_cache_does_not(tmp_path: Path) -> None:
    group = tmp_path / "outer" / "inner"
    group.mkdir(parents=True)
    for directory, limit, used, cache in ((tmp_path / "outer", "1000", 700, 100), (group, "max", 600, 0)):
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.current").write_text(f"{used}\n")
        (directory / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    assert arena_module._left_up_the_tree(tmp_path, "/outer/inner", arena_module._V2) == [400]
    assert arena_module._left_up_the_tree(tmp_path, "/not/seen/from/here", arena_module._V2) == []


def test_prefault_touches_every_page_changes_none_and_reports() -> None:
    arena = create_arena(num_slots=2 * CHUNK_BYTES // PAGE_BYTES + 1, slot_bytes=PAGE_BYTES)
    arena.slot(7)[:] = 7
    before = _resident_bytes()
    seen: list[tuple[int, int]] = []
    prefault = Prefault(arena, lambda done, total: seen.append((done, total)))
    assert prefault.wait(timeout_s=20)
    assert _resident_bytes() - before >= 2 * CHUNK_BYTES
    assert arena.slot(7)[0] == 7
    assert arena.memory.sum() == 7 * PAGE_BYTES
    assert seen == [(done, arena.memory.nbytes) for done in (CHUNK_BYTES, 2 * CHUNK_BYTES, arena.memory.nbytes)]
    arena.close()


def test_prefault_can_be_stopped() -> None:
    arena = create_arena(num_slots=64, slot_bytes=CHUNK_BYTES)
    before = _resident_bytes()
    prefault = Prefault(arena)
    prefault.stop()
    assert prefault.wait(timeout_s=20)
    assert _resident_bytes() - before < 32 * CHUNK_BYTES
    arena.close()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
