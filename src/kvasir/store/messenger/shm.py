"""Reading from an arena of the same machine: map it, copy."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from kvasir.core.errors import ClusterError, TransferError
from kvasir.store.arena import Arena, ArenaHandle, open_arena
from kvasir.store.messenger.spans import Slice, SpanPair, check_spans, cut
from kvasir.store.messenger.transport import PeerArena, Priority, host_identity

INLINE_BYTES = 2 << 20
"""Up to here the event loop copies by itself, 0.1 ms at most: waking a thread and being woken by it takes as long."""

CHUNK_BYTES = 4 << 20
"""Bytes between two looks at whether the read was cancelled."""

MAX_MAPPED = 64
"""Arenas of other processes that stay mapped."""


@dataclass(frozen=True, slots=True)
class _Mapped:
    arena: Arena
    file: tuple[int, int]
    """Device and inode: they tell the arena from another file under the same descriptor of the same or a recycled pid."""


class ShmTransport:
    """Copies between two arenas of one machine; up to `num_threads` large reads at the same time."""

    name = "shm"

    def __init__(self, arena: Arena, *, num_threads: int = 2):
        self._arena = arena
        self._host = host_identity()
        self._mapped: OrderedDict[bytes, _Mapped] = OrderedDict()
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="shm")

    def reaches(self, peer: PeerArena) -> bool:
        return peer.host == self._host

    async def read(
        self,
        peer: PeerArena,
        spans: Sequence[SpanPair],
        *,
        deadline_s: float,
        priority: Priority = Priority.FETCH,
        on_part: Callable[[int], None] | None = None,
    ) -> None:
        """See Transport. A copy cannot stall, so the deadline is looked at between chunks; priorities mean nothing here."""
        check_spans(spans, peer.arena, self._arena.handle)
        mapped = self._map(peer)
        copy = _Copy(mapped.arena, self._arena, spans)
        if copy.nbytes <= INLINE_BYTES:
            copy.run(lambda _: None)
        else:
            await self._run_in_thread(copy, deadline_s, on_part)
        _require_there(peer.arena, mapped)
        if on_part is not None and spans:
            on_part(len(spans))

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._mapped.clear()

    async def _run_in_thread(self, copy: _Copy, deadline_s: float, on_part: Callable[[int], None] | None) -> None:
        loop = asyncio.get_running_loop()
        parts: Callable[[int], None] = (lambda _: None) if on_part is None else on_part
        failure: list[Exception] = []

        def report(whole: int) -> None:
            try:
                if not copy.cancelled.is_set() and whole < copy.num_spans:
                    parts(whole)
            except Exception as error:
                failure.append(error)
                copy.cancelled.set()

        def report_to_loop(whole: int) -> None:
            loop.call_soon_threadsafe(report, whole)

        work = self._threads.submit(copy.run, report_to_loop)
        done = asyncio.wrap_future(work)
        try:
            async with asyncio.timeout_at(deadline_s):
                await asyncio.wait([done])
        except TimeoutError:
            raise TransferError("a copy within this machine outlived its deadline", cause="stalled") from None
        finally:
            work.cancel()
            await _quiesce(copy, done)
        if done.cancelled():
            raise TransferError("the transport was closed", cause="cut")
        if failure:
            raise failure[0]

    def _map(self, peer: PeerArena) -> _Mapped:
        mapped = self._mapped.get(peer.arena.id)
        if mapped is not None:
            self._mapped.move_to_end(peer.arena.id)
            _require_there(peer.arena, mapped)
            return mapped
        try:
            mapped = _Mapped(open_arena(peer.arena), _file_of(peer.arena))
        except (ClusterError, OSError) as error:
            raise TransferError(f"arena of node {peer.node}: {error}", cause="stale_arena") from error
        self._mapped[peer.arena.id] = mapped
        if len(self._mapped) > MAX_MAPPED:
            self._mapped.popitem(last=False)
        return mapped


class _Copy:
    """The copying of one read, on any thread."""

    def __init__(self, source: Arena, target: Arena, spans: Sequence[SpanPair]):
        self.cancelled = threading.Event()
        self.num_spans = len(spans)
        self.nbytes = sum(span.length for span in spans)
        self._source = source
        self._target = target
        self._spans = spans

    def run(self, report: Callable[[int], None]) -> None:
        for chunk in cut(self._spans, max_bytes=CHUNK_BYTES, max_pieces=1024):
            if self.cancelled.is_set():
                return
            copy_pieces(self._source, self._target, chunk)
            report(chunk.whole)


def copy_pieces(source: Arena, target: Arena, chunk: Slice) -> None:
    """Copy from `remote_slot`s of `source` to `local_slot`s of `target`; numpy lets go of the interpreter lock meanwhile."""
    for remote_slot, local_slot, offset, length in chunk.pieces:
        here, there = local_slot * target.stride + offset, remote_slot * source.stride + offset
        np.copyto(target.memory[here : here + length], source.memory[there : there + length])


async def _quiesce(copy: _Copy, done: asyncio.Future[None]) -> None:
    """Wait until the thread writes no more, however often the waiter is cancelled: at most one chunk, a millisecond."""
    copy.cancelled.set()
    cancelled = False
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


def _file_of(handle: ArenaHandle) -> tuple[int, int]:
    status = os.stat(f"/proc/{handle.pid}/fd/{handle.fd}")
    return status.st_dev, status.st_ino


def _require_there(handle: ArenaHandle, mapped: _Mapped) -> None:
    """Raises TransferError when the process ended, or closed the arena or has another one: what was read is void."""
    try:
        if _file_of(handle) == mapped.file:
            return
    except OSError:
        pass
    raise TransferError(f"the arena of process {handle.pid} is gone; was the pool restarted?", cause="stale_arena")
