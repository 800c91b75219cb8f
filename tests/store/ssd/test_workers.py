"""Threads under an event loop: every request is answered once, reads go first, nothing waits for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from kvasir.core.errors import PoolError
from kvasir.store.ssd import SsdFile, SsdOutcome, SsdQueues, SsdRead, SsdWorkers, SsdWrite
from kvasir.store.ssd.buffers import aligned
from kvasir.store.ssd.faulty import FaultPlan, FaultyFiles
from kvasir.store.ssd.file_ops import SystemFiles
from kvasir.store.ssd.layout import DATA_START
from kvasir.store.ssd.meter import Meter
from tests.store.ssd.blocks import SLOT_BYTES, block_of, key_of, opened

OK, ABSENT, FAILED, DROPPED = SsdOutcome.OK, SsdOutcome.ABSENT, SsdOutcome.FAILED, SsdOutcome.DROPPED
NUM_SLOTS = 64


class Stage(SystemFiles):
    """Notes each call on the data, and can hold all of them back."""

    def __init__(self) -> None:
        self.faulty = FaultyFiles(1, FaultPlan())
        self.calls: list[tuple[str, int, int]] = []

    def hold(self) -> None:
        self.faulty.plan = FaultPlan(stall=1.0)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._note("read", buffers, offset)
        return self.faulty.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._note("write", buffers, offset)
        return self.faulty.pwritev(fd, buffers, offset)

    def _note(self, what: str, buffers: Sequence[memoryview], offset: int) -> None:
        size = sum(buffer.nbytes for buffer in buffers)
        if offset >= DATA_START:
            self.calls.append((what, (offset - DATA_START) // SLOT_BYTES, size // SLOT_BYTES))


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    yield stage
    stage.faulty.release()


@pytest.fixture
async def file(tmp_path: Path, stage: Stage) -> AsyncIterator[SsdFile]:
    with opened(tmp_path, num_slots=NUM_SLOTS, ops=stage) as file:
        yield file


def a_write(place: int, number: int | None = None) -> SsdWrite:
    number = place if number is None else number
    return SsdWrite(place, key_of(number), 0, block_of(number))


def a_read(place: int, number: int | None = None) -> SsdRead:
    return SsdRead(place, key_of(place if number is None else number), aligned(SLOT_BYTES))


def nothing(_: object) -> None:
    """A listener that does not care."""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def test_blocks_go_out_and_come_back_through_the_threads(file: SsdFile) -> None:
    async with SsdWorkers(file) as workers:
        outcomes = await asyncio.gather(*(workers.write(p, key_of(p), p, block_of(p)) for p in range(NUM_SLOTS)))
        assert outcomes == [OK] * NUM_SLOTS
        reads = [a_read(p) for p in range(NUM_SLOTS)]
        assert await workers.read(reads) == [OK] * NUM_SLOTS
        assert all(np.array_equal(read.into, block_of(read.ssd_slot)) for read in reads)
        assert await workers.read([a_read(3), a_read(4, 99), a_read(5)]) == [OK, ABSENT, OK], "outcomes in their order"
        assert await workers.read([]) == []


async def test_listeners_hear_in_the_loop_and_exactly_once(file: SsdFile) -> None:
    heard: list[tuple[int, SsdOutcome]] = []

    def listener(place: int) -> Callable[[SsdOutcome], None]:
        def hear(outcome: SsdOutcome) -> None:
            asyncio.get_running_loop()
            heard.append((place, outcome))

        return hear

    async with SsdWorkers(file) as workers:
        for place in range(NUM_SLOTS):
            workers.submit_write(a_write(place), listener(place))
        await until(lambda: len(heard) == NUM_SLOTS)
        assert workers.stats().write_outcomes[OK] == NUM_SLOTS
    assert sorted(heard) == [(place, OK) for place in range(NUM_SLOTS)]


async def test_a_listener_that_fails_harms_no_other(file: SsdFile) -> None:
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context["exception"])))

    def broken(outcome: SsdOutcome) -> None:
        raise ValueError(f"cannot bear {outcome}")

    async with SsdWorkers(file, SsdQueues(depth=1)) as workers:
        heard: list[SsdOutcome] = []
        for place in range(4):
            workers.submit_write(a_write(place), broken if place % 2 else heard.append)
        await until(lambda: len(heard) == 2)
    assert complaints == ["cannot bear ok"] * 2


async def test_reads_overtake_writes_and_hold_all_but_one_back(file: SsdFile, stage: Stage) -> None:
    for place in range(8):
        file.write(place, key_of(place), 0, block_of(place))
    stage.calls.clear()
    stage.hold()
    async with SsdWorkers(file, SsdQueues(depth=2, max_merged_bytes=1)) as workers:
        for place in range(20, 30):
            workers.submit_write(a_write(place), nothing)
        await until(lambda: workers.stats().writes_in_flight == 3)
        reading = asyncio.ensure_future(workers.read([a_read(place) for place in range(8)]))
        await until(lambda: workers.stats().reads_in_flight == 1)
        assert workers.stats().queued_reads == 7
        stage.faulty.release()
        assert await reading == [OK] * 8
        await until(lambda: workers.stats().write_outcomes[OK] == 10)
    begun = [what for what, _, _ in stage.calls]
    assert begun.index("read") <= 3, "a read starts though the depth is full of writes"
    last_read = len(begun) - 1 - begun[::-1].index("read")
    assert "write" in begun[last_read:], "writes come after"


async def test_while_a_read_is_under_way_one_write_runs_and_no_more(file: SsdFile, stage: Stage) -> None:
    file.write(0, key_of(0), 0, block_of(0))
    stage.hold()
    async with SsdWorkers(file, SsdQueues(depth=4, max_merged_bytes=1)) as workers:
        first = asyncio.ensure_future(workers.read([a_read(0)]))
        await until(lambda: workers.stats().reads_in_flight == 1)
        for place in range(20, 26):
            workers.submit_write(a_write(place), nothing)
        await until(lambda: workers.stats().writes_in_flight == 1)
        second = asyncio.ensure_future(workers.read([a_read(1), a_read(0)]))  # wakes the threads again
        await until(lambda: workers.stats().reads_in_flight == 2)
        assert (workers.stats().writes_in_flight, workers.stats().queued_writes) == (1, 5)
        stage.faulty.release()
        assert [*await first, *await second] == [OK, ABSENT, OK]
        await until(lambda: workers.stats().write_outcomes[OK] == 6)


async def test_neighbours_are_moved_together_but_every_thread_gets_some(file: SsdFile, stage: Stage) -> None:
    stage.hold()
    async with SsdWorkers(file, SsdQueues(depth=2, max_merged_bytes=8 * SLOT_BYTES)) as workers:
        for place in (50, 52, 54):
            workers.submit_write(a_write(place), nothing)
        await until(lambda: workers.stats().writes_in_flight == 3)
        for place in range(32):
            workers.submit_write(a_write(place), nothing)
        stage.faulty.release()
        await until(lambda: workers.stats().write_outcomes[OK] == 35)
        stage.calls.clear()
        assert await workers.read([a_read(place) for place in range(32)]) == [OK] * 32
    assert max(count for _, _, count in stage.calls) <= 8
    assert sum(count for _, _, count in stage.calls) == 32
    assert len(stage.calls) < 32


async def test_neighbours_wake_one_thread_and_not_one_each(file: SsdFile, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[str] = []
    wait = threading.Condition.wait

    def counting(condition: threading.Condition, timeout: float | None = None) -> bool:
        is_notified = wait(condition, timeout)
        woken.append(threading.current_thread().name)
        return is_notified

    monkeypatch.setattr(threading.Condition, "wait", counting)
    async with SsdWorkers(file, SsdQueues(depth=8)) as workers:
        await asyncio.sleep(0.05)  # all threads wait
        woken.clear()
        outcomes = await asyncio.gather(*(workers.write(p, key_of(p), 0, block_of(p)) for p in range(NUM_SLOTS)))
        assert outcomes == [OK] * NUM_SLOTS
        assert workers.stats().write_operations < 4
        await asyncio.sleep(0.05)  # whoever was woken has run
        assert len([name for name in woken if name.startswith("ssd-")]) < 8


async def test_closing_ends_all_threads_however_many_slept(file: SsdFile, stage: Stage) -> None:
    stage.hold()
    workers = SsdWorkers(file, SsdQueues(depth=8, max_merged_bytes=1))
    workers.submit_write(a_write(0), nothing)
    await until(lambda: workers.stats().writes_in_flight == 1)
    closing = asyncio.ensure_future(workers.close(drain=True, timeout_s=5.0))
    await asyncio.sleep(0.01)
    stage.faulty.release()
    assert await closing, "only when the last thread has nothing more to do"


async def test_a_full_queue_drops_at_once_and_counts(file: SsdFile, stage: Stage) -> None:
    stage.hold()
    heard: list[SsdOutcome] = []
    async with SsdWorkers(file, SsdQueues(depth=1, max_writes=3, max_reads=2, max_merged_bytes=1)) as workers:
        workers.submit_write(a_write(0), heard.append)
        await until(lambda: workers.stats().writes_in_flight == 1)
        for place in range(1, 6):
            workers.submit_write(a_write(place), heard.append)
        await until(lambda: heard == [DROPPED] * 2)
        assert workers.stats().queued_writes == 3
        stage.faulty.release()
        await until(lambda: len(heard) == 6)
        assert heard[2:] == [OK] * 4
        assert workers.stats().write_outcomes[DROPPED] == 2
        assert await workers.read([a_read(p) for p in (4, 5)]) == [ABSENT] * 2, "and their places are empty"


async def test_what_waits_too_long_behind_a_hanging_disk_is_told_so_and_what_hangs_is_visible(
    file: SsdFile, stage: Stage
) -> None:
    stage.hold()
    heard: list[SsdOutcome] = []
    async with SsdWorkers(file, SsdQueues(depth=1)) as workers:
        workers.submit_write(a_write(0), heard.append, timeout_s=0.01)
        await until(lambda: workers.stats().writes_in_flight == 1)
        workers.submit_write(a_write(9), nothing, timeout_s=1000)
        workers.submit_write(a_write(7), heard.append, timeout_s=0.02)
        assert await workers.write(5, key_of(5), 0, block_of(5), timeout_s=0.01) is DROPPED
        await until(lambda: DROPPED in heard)
        assert heard == [DROPPED], "a write that has begun is not answered before it is over: its memory is in use"
        assert workers.stats().oldest_s > 0
        assert workers.stats().queued_writes == 1
        stage.faulty.release()
        await until(lambda: heard == [DROPPED, OK])


async def test_closing_drops_what_waits_and_finishes_what_runs(file: SsdFile, stage: Stage) -> None:
    stage.hold()
    heard: list[SsdOutcome] = []
    workers = SsdWorkers(file, SsdQueues(depth=1, max_merged_bytes=1))
    for place in range(5):
        workers.submit_write(a_write(place), heard.append)
    await until(lambda: workers.stats().writes_in_flight == 1)
    closing = asyncio.ensure_future(workers.close())
    await until(lambda: heard == [DROPPED] * 4)
    stage.faulty.release()
    assert await closing
    assert heard == [DROPPED] * 4 + [OK]
    workers.submit_write(a_write(9), heard.append)
    assert await workers.read([a_read(0)]) == [DROPPED], "closed workers drop everything"
    assert heard[-1] is DROPPED
    assert await workers.close()


async def test_closing_can_finish_what_waits(file: SsdFile) -> None:
    heard: list[SsdOutcome] = []
    workers = SsdWorkers(file, SsdQueues(depth=1, max_merged_bytes=1))
    for place in range(20):
        workers.submit_write(a_write(place), heard.append)
    assert await workers.close(drain=True)
    assert heard == [OK] * 20


async def test_closing_does_not_wait_for_a_disk_that_hangs(file: SsdFile, stage: Stage) -> None:
    stage.hold()
    heard: list[SsdOutcome] = []
    workers = SsdWorkers(file, SsdQueues(depth=1, max_merged_bytes=1))
    for place in range(3):
        workers.submit_write(a_write(place), heard.append)
    await until(lambda: workers.stats().writes_in_flight == 1)
    assert not await workers.close(drain=True, timeout_s=0.05)
    await until(lambda: heard == [DROPPED] * 2)
    stage.faulty.release()
    assert await workers.close()
    assert heard == [DROPPED, DROPPED, OK]


async def test_a_wait_that_is_cancelled_leaves_the_others_alone(file: SsdFile, stage: Stage) -> None:
    stage.hold()
    async with SsdWorkers(file, SsdQueues(depth=1)) as workers:
        first = asyncio.ensure_future(workers.write(0, key_of(0), 0, block_of(0)))
        second = asyncio.ensure_future(workers.write(1, key_of(1), 0, block_of(1)))
        await until(lambda: workers.stats().writes_in_flight == 1)
        first.cancel()
        stage.faulty.release()
        assert await second is OK
        assert first.cancelled()
        assert workers.stats().write_outcomes[OK] == 2, "it was written all the same"


async def test_errors_and_nonsense_are_told_apart(file: SsdFile, stage: Stage) -> None:
    async with SsdWorkers(file) as workers:
        with pytest.raises(PoolError, match="does not exist"):
            workers.submit_write(a_write(NUM_SLOTS), nothing)
        stage.faulty.plan = FaultPlan(write_error=1.0)
        assert await workers.write(0, key_of(0), 0, block_of(0)) is FAILED
        stats = workers.stats()
        assert stats.errors == {"EIO": 2}
        assert (stats.write_outcomes[FAILED], stats.write_bytes, stats.write_operations) == (1, 0, 1)


async def test_statistics_add_up(file: SsdFile) -> None:
    async with SsdWorkers(file) as workers:
        await asyncio.gather(*(workers.write(p, key_of(p), p, block_of(p)) for p in range(NUM_SLOTS)))
        for _ in range(20):
            await workers.read([a_read(p) for p in range(NUM_SLOTS)])
        stats = workers.stats()
    assert stats.write_bytes == NUM_SLOTS * SLOT_BYTES
    assert stats.read_bytes == 20 * NUM_SLOTS * SLOT_BYTES
    assert 20 <= stats.read_operations <= 20 * NUM_SLOTS
    assert stats.read_busy_s > 0
    assert (stats.reads_in_flight, stats.writes_in_flight, stats.queued_reads, stats.queued_writes) == (0, 0, 0, 0)
    assert (stats.oldest_s, stats.errors, stats.is_direct) == (0.0, {}, file.is_direct)


def test_a_meter_counts_busy_time_once_and_idle_time_never() -> None:
    meter = Meter()
    meter.started(10.0)
    meter.started(11.0)
    meter.ended(12.0, 100)
    meter.ended(13.0, 200)
    meter.started(99.0)
    meter.ended(100.0, 0)
    assert (meter.busy_s, meter.num_bytes, meter.operations, meter.in_flight) == (4.0, 300, 3, 0)


def test_a_meter_s_speed_follows_the_disk_and_ignores_idleness() -> None:
    meter = Meter()
    meter.started(0.0)
    meter.ended(0.001, 1000)
    assert meter.bytes_per_s is None, "a millisecond says nothing yet"
    now = 0.001
    for _ in range(100):
        meter.started(now)
        meter.ended(now := now + 0.1, 100_000)
    assert meter.bytes_per_s == pytest.approx(1e6, rel=0.01)
    for _ in range(100):
        now += 50.0
        meter.started(now)
        meter.ended(now := now + 0.1, 10_000)
    assert meter.bytes_per_s == pytest.approx(1e5, rel=0.01)
