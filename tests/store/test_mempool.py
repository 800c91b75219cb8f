"""The pool as a library: what goes in comes out, byte for byte, whatever is evicted, swapped, deleted or restarted."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvasir.core.errors import ConfigError, PoolError
from kvasir.core.keys import KEY_BYTES
from kvasir.core.tier import Tier
from kvasir.store.mempool import Bytes, MemPool
from kvasir.store.ssd import SsdOutcome, SsdWrite

SIZE = 4096 + 512


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def value(number: int) -> Bytes:
    return np.random.default_rng(number).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture
def pool() -> Iterator[MemPool]:
    with MemPool(num_blocks=8, block_bytes=SIZE) as made:
        yield made
        made.check()


def test_what_is_put_can_be_got_and_looked_at_in_place(pool: MemPool) -> None:
    pool.batch_put([key(1), key(2)], [value(1), value(2)])
    assert np.array_equal(pool.get(key(1)), value(1))
    into = np.zeros((SIZE // 4,), np.float32)
    pool.get(key(2), into)
    assert into.tobytes() == value(2).tobytes()
    with pool.match([key(1), key(2), key(3)]) as found:
        assert len(found) == 2
        assert np.array_equal(found.blocks[1], value(2))
        with pytest.raises(ValueError, match="read-only"):
            found.blocks[0][0] = 1


def test_a_second_put_of_a_key_keeps_the_first_block_and_leaks_nothing(pool: MemPool) -> None:
    for _ in range(20):
        pool.put(key(1), value(1))
    stats = pool.stats()
    assert (stats.published, stats.reserved, stats.leases) == (1, 0, 0)


def test_a_full_pool_evicts_what_nobody_holds_and_nothing_else(pool: MemPool) -> None:
    pool.put(key(0), value(0))
    with pool.pin([key(0)]):
        for number in range(1, 30):
            pool.put(key(number), value(number))
        assert np.array_equal(pool.get(key(0)), value(0))
    assert pool.exists(key(1)) is None
    with pytest.raises(PoolError, match="is not here"):
        pool.get(key(1))


def test_a_pool_that_is_held_altogether_says_so_and_takes_nothing(pool: MemPool) -> None:
    addresses = pool.alloc(8)
    with pytest.raises(PoolError, match="no room for 1 blocks"):
        pool.put(key(1), value(1))
    pool.free(addresses)
    pool.put(key(1), value(1))


def test_memory_can_be_written_in_place_before_it_is_inserted(pool: MemPool) -> None:
    addresses = pool.alloc(2)
    for number, address in enumerate(addresses):
        pool.block(address)[:] = value(number)
    pool.insert([key(0), key(1)], addresses)
    assert np.array_equal(pool.get(key(1)), value(1))
    pool.delete([key(0)])
    assert (pool.exists(key(0)), pool.exists(key(1))) == (None, Tier.DRAM)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda p: p.put(key(1), np.zeros(5, np.uint8)), "block of 5 bytes, contiguous: expected 4608"),
        (lambda p: p.put(key(1), np.zeros((SIZE, 2), np.uint8)[:, 0]), "not contiguous"),
        (lambda p: p.put(b"short", value(1)), "key of 5 bytes, expected 16"),
        (lambda p: p.batch_put([key(1)], []), "1 keys for 0 blocks"),
        (lambda p: p.block(8), "address 8 does not exist"),
        (lambda p: p.free([3]), "slots \\[3\\] are not reserved"),
        (lambda p: p.insert([key(1)], [3]), "cannot insert slots \\[3\\]"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line_and_changes_nothing(pool: MemPool, wrong: object, told: str) -> None:
    with pytest.raises(PoolError, match=told):
        wrong(pool)  # type: ignore[operator]
    stats = pool.stats()
    assert (stats.free, stats.leases) == (8, 0)


def test_an_arena_larger_than_the_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        MemPool(num_blocks=1 << 20, block_bytes=1 << 30)


def test_a_closed_pool_refuses_and_may_be_closed_again(tmp_path: Path) -> None:
    pool = MemPool(num_blocks=4, block_bytes=SIZE, ssd_path=tmp_path, ssd_blocks=4)
    pool.close()
    pool.close()
    with pytest.raises(PoolError, match="is closed"):
        pool.put(key(1), value(1))


def test_blocks_move_to_another_pool_and_appear_there_complete(pool: MemPool) -> None:
    with MemPool(num_blocks=4, block_bytes=SIZE) as other:
        pool.batch_put([key(1), key(2)], [value(1), value(2)])
        with pool.match([key(1), key(2)]) as found:
            pool.transfer_with_insert(other, [key(1), key(2)], found.addresses)
        pool.change_replica(key(1), [other])
        assert np.array_equal(other.get(key(2)), value(2))
        other.check()
        assert other.stats().published == 2
        for wrong in ([b"short"], [key(3), key(4)]):
            with pytest.raises(PoolError, match=r"key of 5 bytes|2 keys for 1 addresses"):
                pool.transfer_with_insert(other, wrong, [0])
        assert other.stats().reserved == 0
    with MemPool(num_blocks=4, block_bytes=64) as small, pytest.raises(PoolError, match="do not fit each other"):
        pool.transfer_with_insert(small, [key(1)], [0])


def test_threads_may_use_one_pool() -> None:
    with MemPool(num_blocks=32, block_bytes=SIZE) as pool:
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            rng = Random(seed)
            try:
                for _ in range(300):
                    number = rng.randrange(50)
                    if rng.random() < 0.5:
                        pool.put(key(number), value(number))
                    elif pool.exists(key(number)) is not None:
                        with contextlib.suppress(PoolError):  # evicted in between
                            assert np.array_equal(pool.get(key(number)), value(number))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        assert not failures
        pool.check()


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "get", "match", "delete", "swap_out", "swap_in", "restart"]), st.integers(0, 11)),
    max_size=40,
)


def test_what_was_deleted_is_not_there_after_a_restart(tmp_path: Path) -> None:
    def made() -> MemPool:
        return MemPool(num_blocks=4, block_bytes=SIZE, ssd_path=tmp_path, ssd_blocks=6)

    with made() as pool:
        for number in range(3):
            pool.put(key(number), value(number))
        pool.flush()
        pool.delete([key(1)])
        pool.put(key(3), value(3))
        pool.delete([key(3)])  # its write may be under way
    with made() as pool:
        assert [pool.exists(key(number)) for number in range(4)] == [Tier.SSD, None, Tier.SSD, None]


def test_a_disk_that_is_slower_than_the_puts_costs_time_and_no_block(tmp_path: Path) -> None:
    with MemPool(num_blocks=4, block_bytes=SIZE, ssd_path=tmp_path, ssd_blocks=64) as pool:
        for number in range(50):
            pool.put(key(number), value(number))
        assert pool.stats().dropped == 0
        for number in range(50):
            assert np.array_equal(pool.get(key(number)), value(number))


def test_a_block_is_read_back_though_all_memory_is_being_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MemPool(num_blocks=4, block_bytes=SIZE, ssd_path=tmp_path, ssd_blocks=64) as pool:
        assert pool._file is not None
        write_many = pool._file.write_many

        def slowly(writes: Sequence[SsdWrite]) -> list[SsdOutcome]:
            time.sleep(0.1)
            return write_many(writes)

        monkeypatch.setattr(pool._file, "write_many", slowly)
        for number in range(8):
            pool.put(key(number), value(number))
        assert np.array_equal(pool.get(key(0)), value(0))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_no_byte_is_ever_wrong_and_what_is_on_the_ssd_survives(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    """A block may be gone, but what is found is what was put, and what was deleted is not found."""
    disk = tmp_path_factory.mktemp("disk")

    def made() -> MemPool:
        return MemPool(num_blocks=4, block_bytes=SIZE, ssd_path=disk, ssd_blocks=6)

    pool, put = made(), set[int]()
    for step, number in steps:
        match step:
            case "put":
                pool.put(key(number), value(number))
                put.add(number)
            case "get":
                tier = pool.exists(key(number))
                assert tier is None or number in put
                if tier is not None:
                    assert np.array_equal(pool.get(key(number)), value(number))
            case "match":
                with pool.match([key(number), key(number + 1)]) as found:
                    for at, block in enumerate(found.blocks):
                        assert np.array_equal(block, value(number + at))
            case "delete":
                pool.delete([key(number)])
                assert pool.exists(key(number)) is None
            case "swap_out":
                there = pool.exists(key(number))
                assert pool.swap_out([key(number)]) == (there is not None)
            case "swap_in":
                there = pool.exists(key(number))
                assert pool.swap_in([key(number)]) == (there is not None)
            case "restart":
                on_ssd = [n for n in range(12) if pool.swap_out([key(n)])]
                pool.close()
                pool = made()
                assert [n for n in range(12) if pool.exists(key(n)) is not None] == on_ssd
        pool.check()
    pool.close()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pool_numpy.py", "after a restart 4 blocks are back"),
        ("pool_two_processes.py", "decode has 8 blocks; they begin with [0, 1, 2, 3, 4, 5, 6, 7]"),
    ],
)
def test_the_examples_run(name: str, told: str) -> None:
    example = Path(__file__).parents[2] / "examples" / name
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
