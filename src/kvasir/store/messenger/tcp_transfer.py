"""One read or push on its way over TCP: which slices are left to send, which arrived, and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from kvasir.store.messenger import tcp_wire as wire
from kvasir.store.messenger.spans import Slice
from kvasir.store.messenger.transport import Priority


class Transfer:
    """`done` ends with None when all slices arrived, or with what failed first."""

    def __init__(
        self,
        op: wire.Op,
        slices: Iterator[Slice],
        *,
        priority: Priority,
        on_part: Callable[[int], None] | None,
        ticket: bytes,
    ):
        self.op = op
        self.priority = priority
        self.ticket = ticket
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_part = on_part
        self._slices = slices
        self._next = next(slices, None)
        self._after_next = next(slices, None)
        self._arrived: dict[int, int] = {}
        self._awaited = 0
        self._num_taken = 0

    @property
    def has_more(self) -> bool:
        """Whether slices are left to be sent."""
        return self._next is not None

    @property
    def is_long(self) -> bool:
        """Whether more than one slice is left, so that a second stream helps."""
        return self._after_next is not None

    def take(self) -> Slice:
        """The next slice to be sent."""
        assert self._next is not None, "only taken from while it has more"
        self._num_taken += 1
        taken, self._next, self._after_next = self._next, self._after_next, next(self._slices, None)
        return taken

    def arrive(self, piece: Slice) -> None:
        """Count a slice; those of two streams overtake each other, so parts are told as far as nothing is missing before."""
        self._arrived[piece.number] = piece.whole
        whole = None
        while self._awaited in self._arrived:
            whole = self._arrived.pop(self._awaited)
            self._awaited += 1
        if whole is None or self.done.done():
            return
        if self._on_part is not None:
            try:
                self._on_part(whole)
            except Exception as error:  # the caller's, and the caller's to handle
                self.fail(error)
                return
        if not self.has_more and self._awaited == self._num_taken:
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
