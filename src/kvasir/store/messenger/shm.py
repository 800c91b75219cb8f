"""Reading from an arena of the same machine: map it, copy.

The event loop copies by itself, a chunk a turn. A thread would have to be woken and waited for, which takes as long as copying
1 MiB, and a cancelled read would have to wait for it; so nothing writes behind the loop's back, as with TCP.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvasir.core.errors import ClusterError, TransferError
from kvasir.store.arena import Arena, ArenaHandle, open_arena
from kvasir.store.copying import Copy, fastest_copy
from kvasir.store.messenger.spans import Slice, SpanPair, check_spans, cut
from kvasir.store.messenger.transport import PeerArena, Priority, host_identity

CHUNK_BYTES = 4 << 20
"""Bytes a turn of the event loop, 0.25 ms."""

MAX_PIECES = 1024
MAX_MAPPED = 64
"""Arenas of other processes that stay mapped."""

LOOK_S = 5.0
"""How often arenas are looked for whose process ended or closed them: mapped here, they would keep their memory."""


@dataclass(frozen=True, slots=True)
class _Mapped:
    arena: Arena
    file: tuple[int, int]
    """Device and inode: they tell the arena from another file under the same descriptor of the same or a recycled pid."""

    @property
    def is_there(self) -> bool:
        """Whether its process still has it."""
        try:
            return _file_of(self.arena.handle) == self.file
        except OSError:
            return False


class ShmTransport:
    """Copies between two arenas of one machine; reads that go on at the same time take turns."""

    name = "shm"

    def __init__(self, arena: Arena):
        self._arena = arena
        self._copy = fastest_copy()
        self._host = host_identity()
        self._mapped: OrderedDict[bytes, _Mapped] = OrderedDict()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._is_open = True

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
        """See Transport. Priorities mean nothing here."""
        check_spans(spans, peer.arena, self._arena.handle)
        if not self._is_open:
            raise TransferError("the transport was closed", cause="refused")
        mapped = self._map(peer)
        for chunk in cut(spans, max_bytes=CHUNK_BYTES, max_pieces=MAX_PIECES):
            if chunk.number:
                await asyncio.sleep(0)
                self._require_time(deadline_s)
            copy_pieces(self._copy, mapped.arena, self._arena, chunk)
            if not mapped.is_there:
                why = f"the arena of process {peer.arena.pid} is gone; was the pool restarted?"  # what was read is void
                raise TransferError(why, cause="stale_arena")
            if on_part is not None:
                on_part(chunk.whole)

    async def close(self) -> None:
        """Ends all reads: they raise TransferError (cut)."""
        self._is_open = False
        if self._timer is not None:
            self._timer.cancel()
        self._mapped.clear()

    def _require_time(self, deadline_s: float) -> None:
        if not self._is_open:
            raise TransferError("the transport was closed", cause="cut")
        if self._loop.time() >= deadline_s:
            raise TransferError("a copy within this machine outlived its deadline", cause="stalled")

    def _map(self, peer: PeerArena) -> _Mapped:
        mapped = self._mapped.get(peer.arena.id)
        if mapped is not None:
            self._mapped.move_to_end(peer.arena.id)
            return mapped
        try:
            mapped = _Mapped(open_arena(peer.arena), _file_of(peer.arena))
        except (ClusterError, OSError) as error:
            raise TransferError(f"arena of node {peer.node}: {error}", cause="stale_arena") from error
        self._mapped[peer.arena.id] = mapped
        if len(self._mapped) > MAX_MAPPED:
            self._mapped.popitem(last=False)
        if self._timer is None:
            self._timer = self._loop.call_later(LOOK_S, self._unmap_gone)
        return mapped

    def _unmap_gone(self) -> None:
        for arena_id in [arena_id for arena_id, mapped in self._mapped.items() if not mapped.is_there]:
            del self._mapped[arena_id]
        self._timer = self._loop.call_later(LOOK_S, self._unmap_gone) if self._mapped else None


def copy_pieces(copy: Copy, source: Arena, target: Arena, chunk: Slice) -> None:
    """Copy from `remote_slot`s of `source` to `local_slot`s of `target`."""
    for remote_slot, local_slot, offset, length in chunk.pieces:
        here, there = local_slot * target.stride + offset, remote_slot * source.stride + offset
        copy(target.memory[here : here + length], source.memory[there : there + length])


def _file_of(handle: ArenaHandle) -> tuple[int, int]:
    status = os.stat(f"/proc/{handle.pid}/fd/{handle.fd}")
    return status.st_dev, status.st_ino
