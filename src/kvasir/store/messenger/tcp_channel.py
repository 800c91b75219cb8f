"""A socket on the event loop that gathers from and scatters into memory without a copy in between.

Not asyncio's transports: on Python 3.11 they copy what they could not send at once, and their protocols receive into one
buffer per system call, which small layers make slow. Not threads either: measured on two cores, a thread per stream costs
up to twice the processor time at 64 KiB and gains nothing at 1 and 16 MiB. And on the event loop nothing is written behind
anybody's back: once a receive is diverted or its channel is closed, no byte goes to its memory any more.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from kvasir.core.errors import TransferError

TURN_BYTES = 1 << 20
"""Bytes that one turn of the event loop moves for one channel, about 0.2 ms: others have their turn then."""

MAX_VIEWS = 1024  # IOV_MAX of Linux

Lost = Callable[[TransferError], None]


class Channel:
    """Owns a connected socket. `lost` is called once, when the peer ends it or breaks it; not by `close`.

    `drained` is called whenever all that was queued has gone to the kernel. `moved` counts bytes both ways: who watches for
    progress compares it.
    """

    def __init__(self, sock: socket.socket, lost: Lost, drained: Callable[[], None] | None = None):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.moved = 0
        self.is_open = True
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._lost = lost
        self._drained = drained
        self._expected: list[memoryview] = []
        self._at = 0
        self._then: Callable[[], None] | None = None
        self._out: deque[memoryview] = deque()
        self._at_once = True
        self._reading = self._writing = False

    @property
    def is_sending(self) -> bool:
        return bool(self._out)

    def send(self, views: Iterable[bytes | memoryview]) -> None:
        """Queue; as much as the kernel takes goes at once. The memory must stay as it is until it has been sent."""
        if not self.is_open:
            return
        self._out.extend([memoryview(view) for view in views])
        if not self._writing:
            self._flush()

    def expect(self, views: Sequence[memoryview], then: Callable[[], None], *, at_once: bool = True) -> None:
        """Fill these, in order, and call `then`, which says what to expect next; expecting nothing stops reading.

        They may have come already, unless it is clear that they can not be there `at_once`: that saves asking for them in vain.
        """
        if not self.is_open:
            return
        self._expected, self._at, self._then, self._at_once = list(views), 0, then, at_once
        if not self._reading:
            self._reading = True
            self._loop.add_reader(self._sock.fileno(), self._receive)

    def divert(self, first: int, scratch: memoryview) -> None:
        """What is still missing of the expected views from number `first` on goes to `scratch`, over and over."""
        start = max(self._at, first)
        missing = sum(view.nbytes for view in self._expected[start:])
        self._expected = [*self._expected[:start], *repeated(scratch, missing)]

    def close(self) -> None:
        """Nothing is read or written from now on. May be called again."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._expected, self._then = [], None
        self._out.clear()

    def end_sending(self) -> None:
        """Tell the peer that nothing more comes, once all was sent."""
        self._sock.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        budget = TURN_BYTES
        self._at_once = True
        while self._at_once and self._then is not None and budget > 0:
            try:
                got = self._sock.recvmsg_into(self._expected[self._at : self._at + MAX_VIEWS])[0]
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._lose(f"receiving failed: {error.strerror}")
                return
            if not got:
                self._lose("the peer closed the connection")
                return
            budget -= got
            self.moved += got
            if not self._took(got):
                return
        if self.is_open and self._then is None:
            self._reading = False
            self._loop.remove_reader(self._sock.fileno())

    def _took(self, got: int) -> bool:
        """Move on by so many bytes; at the end of what was expected call `then` and answer True."""
        views = self._expected
        while self._at < len(views) and got >= views[self._at].nbytes:
            got -= views[self._at].nbytes
            self._at += 1
        if self._at < len(views):
            views[self._at] = views[self._at][got:]
            return False
        then, self._then, self._expected = self._then, None, []
        assert then is not None, "bytes are only received for somebody"
        then()
        return True

    def _flush(self) -> None:
        budget = TURN_BYTES
        while self._out and budget > 0:
            try:
                sent = self._sock.sendmsg(list(islice(self._out, MAX_VIEWS)))
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._lose(f"sending failed: {error.strerror}")
                return
            budget -= sent
            self.moved += sent
            self._sent(sent)
        self._watch_writing()

    def _sent(self, sent: int) -> None:
        while self._out and sent >= self._out[0].nbytes:
            sent -= self._out.popleft().nbytes
        if sent:
            self._out[0] = self._out[0][sent:]

    def _watch_writing(self) -> None:
        if bool(self._out) == self._writing or not self.is_open:
            return
        self._writing = bool(self._out)
        if self._writing:
            self._loop.add_writer(self._sock.fileno(), self._flush)
            return
        self._loop.remove_writer(self._sock.fileno())
        if self._drained is not None:
            self._drained()

    def _lose(self, why: str) -> None:
        self.lose(TransferError(why, cause="cut"))

    def lose(self, error: TransferError) -> None:
        """Close, and tell the owner why."""
        if self.is_open:
            self.close()
            self._lost(error)


def repeated(scratch: memoryview, nbytes: int) -> list[memoryview]:
    """So many bytes of views, all over the same memory."""
    whole, rest = divmod(nbytes, scratch.nbytes)
    return [scratch] * whole + ([scratch[:rest]] if rest else [])
