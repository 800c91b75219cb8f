"""Threads that write and read an SsdFile for an event loop: reads first, in bounded queues, each request answered exactly once.

    loop ── submit ──▶ reads  ─┐                        ┌─ SsdFile.read_many  ─┐
                       writes ─┴─▶ the next free thread ┴─ SsdFile.write_many ─┴──▶ on_done(outcome), in the loop

A read makes a request wait, a write makes nobody wait: a thread takes a read when there is one, and while reads are queued or
under way only one write runs, so that neither starves. Requests that follow each other in place are moved together.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import structlog

from kvasir.core.keys import BlockKey
from kvasir.store.ssd.buffers import Bytes
from kvasir.store.ssd.figures import SsdQueues, SsdStats
from kvasir.store.ssd.file import SsdFile
from kvasir.store.ssd.lanes import Job, Lane, OnDone
from kvasir.store.ssd.requests import Request, SsdOutcome, SsdRead, SsdWrite

SPARE_THREADS = 1
"""When as many writes are under way as may be, a read starts nevertheless."""

WORTHWHILE_BYTES = 1 << 20
"""Neighbours are taken together up to here even if threads idle: smaller operations cost more processor than they win."""

SWEEP_S = 0.05
"""Late requests are told so within this time."""


class SsdWorkers:
    """Made and used in a running event loop; an async context manager that drops what waits at its end.

    `on_done` is called in the loop, exactly once for each request, when nobody touches the request's memory any longer: so
    neither a deadline nor a cancelled task ends an operation that has begun. Deadlines bound the wait for one.
    """

    def __init__(self, file: SsdFile, queues: SsdQueues | None = None):
        self._file = file
        self._queues = queues = queues if queues is not None else SsdQueues()
        self._log = structlog.get_logger().bind(part="ssd")
        self._loop = asyncio.get_running_loop()
        self._reads: Lane[SsdRead] = Lane(queues.max_reads, file.read_valid)
        self._writes: Lane[SsdWrite] = Lane(queues.max_writes, file.write_valid)
        self._changed = threading.Condition()
        self._closing = False
        self._began: dict[int, float] = {}
        self._done: list[tuple[OnDone, SsdOutcome]] = []
        self._is_waking = False
        self._sweep: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"ssd-{i}", daemon=True) for i in range(queues.under_way + SPARE_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- asking ------------------------------------------------------------------------------------------------

    def submit_write(self, write: SsdWrite, on_done: OnDone, *, timeout_s: float | None = None) -> None:
        """Write a block when its turn comes. A full queue drops it at once. Raises PoolError for what makes no sense."""
        self._file.require_valid([write])
        self._submit(self._writes, [Job(write, on_done, self._deadline(timeout_s))])

    def submit_reads(
        self, reads: Sequence[SsdRead], on_done: Callable[[list[SsdOutcome]], None], *, timeout_s: float | None = None
    ) -> None:
        """Read blocks; `on_done` hears all outcomes, in their order, when the last read is over. Else as `submit_write`."""
        self._file.require_valid(reads)
        if not reads:
            self._loop.call_soon(on_done, [])
            return
        together = _Together(len(reads), on_done)
        deadline_s = self._deadline(timeout_s)
        self._submit(self._reads, [Job(read, together.hearing(i), deadline_s) for i, read in enumerate(reads)])

    async def write(
        self, ssd_slot: int, key: BlockKey, depth: int, data: Bytes, *, timeout_s: float | None = None
    ) -> SsdOutcome:
        """Write one block and wait. `data` must stay as it is until the write is over, also when this wait is cancelled."""
        future: asyncio.Future[SsdOutcome] = self._loop.create_future()
        self.submit_write(SsdWrite(ssd_slot, key, depth, data), _resolver(future), timeout_s=timeout_s)
        return await future

    async def read(self, reads: Sequence[SsdRead], *, timeout_s: float | None = None) -> list[SsdOutcome]:
        """Read blocks and wait. The targets stay in use until the reads are over, also when this wait is cancelled."""
        future: asyncio.Future[list[SsdOutcome]] = self._loop.create_future()
        self.submit_reads(reads, _resolver(future), timeout_s=timeout_s)
        return await future

    def stats(self) -> SsdStats:
        with self._changed:
            reads, writes = self._reads, self._writes
            return SsdStats(
                read_operations=reads.meter.operations,
                write_operations=writes.meter.operations,
                read_bytes=reads.meter.num_bytes,
                write_bytes=writes.meter.num_bytes,
                read_busy_s=reads.meter.busy_s,
                write_busy_s=writes.meter.busy_s,
                read_bytes_per_s=reads.meter.bytes_per_s,
                write_bytes_per_s=writes.meter.bytes_per_s,
                read_outcomes=dict(reads.outcomes),
                write_outcomes=dict(writes.outcomes),
                queued_reads=len(reads.queue) + len(reads.brought),
                queued_writes=len(writes.queue) + len(writes.brought),
                reads_in_flight=reads.meter.in_flight,
                writes_in_flight=writes.meter.in_flight,
                oldest_s=max((self._loop.time() - began for began in self._began.values()), default=0.0),
                errors=dict(self._file.errors),
                is_direct=self._file.is_direct,
            )

    async def close(self, *, drain: bool = False, timeout_s: float = 10.0) -> bool:
        """Take nothing more, finish (`drain`) or drop what waits, and end the threads. May be called again.

        False when operations were still under way after `timeout_s`: a disk that hangs. They are answered if they ever end.
        """
        self._line_up()
        with self._changed:
            self._closing = True
            self._reads.limit = self._writes.limit = 0
        if not drain:
            self._drop_all()
        with self._changed:
            self._changed.notify_all()
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            self._drop_all()
            self._log.warning("SSD operations do not end", in_flight=len(self._began), waited_s=timeout_s)
            return False
        return True

    # --- in the loop -------------------------------------------------------------------------------------------

    def _deadline(self, timeout_s: float | None) -> float | None:
        return None if timeout_s is None else self._loop.time() + timeout_s

    def _submit(self, lane: Lane[Request], jobs: Sequence[Job[Request]]) -> None:
        lane.brought += jobs
        if len(lane.brought) > lane.limit:
            self._line_up()
        if not self._is_waking:
            self._is_waking = True
            self._loop.call_soon(self._wake)
        if jobs[0].deadline_s is not None and self._sweep is None:
            self._sweep = self._loop.call_at(jobs[0].deadline_s, self._drop_late)

    def _wake(self) -> None:
        """At the end of the loop's turn, when all that it brought is there: neighbours are then taken together.

        One thread is enough: each that begins wakes the next while something is left. So as many wake as there are
        operations, which of small blocks are far fewer than blocks.
        """
        self._is_waking = False
        self._line_up()

    def _line_up(self) -> None:
        with self._changed:
            dropped = self._reads.line_up() + self._writes.line_up()
            self._changed.notify()
        self._tell_dropped(dropped)

    def _drop_late(self) -> None:
        """Also when every thread hangs in the disk."""
        now = self._loop.time()
        self._line_up()
        with self._changed:
            late = self._reads.drop(lambda job: job.is_late(now)) + self._writes.drop(lambda job: job.is_late(now))
            deadlines = [d for d in (self._reads.first_deadline(), self._writes.first_deadline()) if d is not None]
        self._sweep = self._loop.call_at(max(min(deadlines), now + SWEEP_S), self._drop_late) if deadlines else None
        self._tell_dropped(late)

    def _drop_all(self) -> None:
        self._line_up()
        with self._changed:
            dropped = self._reads.drop(lambda _: True) + self._writes.drop(lambda _: True)
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        self._tell_dropped(dropped)

    def _tell_dropped(self, listeners: Sequence[OnDone]) -> None:
        for on_done in listeners:
            self._loop.call_soon(on_done, SsdOutcome.DROPPED)

    def _tell_done(self) -> None:
        """One wake-up of the loop may bring many outcomes; each listener is called by itself, so that none can harm another."""
        with self._changed:
            done, self._done = self._done, []
        for on_done, outcome in done:
            self._loop.call_soon(on_done, outcome)

    # --- in the threads ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._serve_next():
            pass
        with self._changed:
            self._threads.remove(threading.current_thread())
            is_last = not self._threads
        if is_last:
            self._call_loop(self._ended.set)

    def _serve_next(self) -> bool:
        """Wait for a request and carry it out; False when there will be none."""
        with self._changed:
            while (carry_out := self._begin_next()) is None:
                if self._closing and not self._reads.queue and not self._writes.queue:
                    self._changed.notify()
                    return False
                self._changed.wait()
            if self._reads.queue or self._writes.queue:
                self._changed.notify()
        carry_out()
        return True

    def _begin_next(self) -> Callable[[], None] | None:
        if self._reads.queue and self._reads.meter.in_flight < self._queues.under_way:
            return partial(self._carry_out, self._reads, self._begin(self._reads))
        if self._writes.queue and self._writes.meter.in_flight < self._max_writes_now():
            return partial(self._carry_out, self._writes, self._begin(self._writes))
        return None

    def _max_writes_now(self) -> int:
        return 1 if self._reads.queue or self._reads.meter.in_flight else self._queues.under_way

    def _begin(self, lane: Lane[Request]) -> list[Job[Request]]:
        """Take a fair share, so that merging does not make the disk's queue shorter; of small blocks more than that."""
        fair = max(-(-len(lane.queue) // self._queues.depth), WORTHWHILE_BYTES // self._file.slot_bytes)
        jobs = lane.take(max(1, min(fair, self._queues.max_merged_bytes // self._file.slot_bytes)))
        now = self._loop.time()
        lane.meter.started(now)
        self._began[threading.get_ident()] = now
        return jobs

    def _carry_out(self, lane: Lane[Request], jobs: Sequence[Job[Request]]) -> None:
        outcomes = self._outcomes(lane, jobs)
        with self._changed:
            del self._began[threading.get_ident()]
            lane.meter.ended(self._loop.time(), lane.count(outcomes) * self._file.slot_bytes)
            is_first = not self._done
            self._done.extend(zip([job.on_done for job in jobs], outcomes, strict=True))
        if is_first:
            self._call_loop(self._tell_done)

    def _outcomes(self, lane: Lane[Request], jobs: Sequence[Job[Request]]) -> list[SsdOutcome]:
        now = self._loop.time()
        if any(job.is_late(now) for job in jobs):
            return (
                [SsdOutcome.DROPPED] * len(jobs) if len(jobs) == 1 else [o for job in jobs for o in self._outcomes(lane, [job])]
            )
        try:
            return lane.perform([job.request for job in jobs])
        except Exception:  # the thread's outermost loop: whatever it was, the request must be answered and the thread live on
            self._log.exception("SSD operation failed")
            return [SsdOutcome.FAILED] * len(jobs)

    def _call_loop(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            self._log.debug("an SSD operation ended after its event loop")


class _Together:
    """Collects the outcomes of a batch."""

    def __init__(self, count: int, on_done: Callable[[list[SsdOutcome]], None]):
        self._outcomes = [SsdOutcome.DROPPED] * count
        self._missing = count
        self._on_done = on_done

    def hearing(self, index: int) -> OnDone:
        """For the request of this number."""

        def hear(outcome: SsdOutcome) -> None:
            self._outcomes[index] = outcome
            self._missing -= 1
            if not self._missing:
                self._on_done(self._outcomes)

        return hear


T = TypeVar("T")


def _resolver(future: asyncio.Future[T]) -> Callable[[T], None]:
    def resolve(value: T) -> None:
        if not future.done():
            future.set_result(value)

    return resolve
