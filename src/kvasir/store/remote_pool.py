"""The pool of another process, here or on another machine: what a MemPool with `listen` offers to others.

with MemPool(num_blocks=1024, block_bytes=1 << 20, listen="10.0.0.1:0") as pool, RemotePool("10.0.0.2:7401") as other:
    with pool.match(keys) as found:
        pool.transfer_with_insert(other, keys, found.addresses)
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kvasir.core.errors import PoolError
from kvasir.core.keys import BlockKey
from kvasir.core.tier import Tier
from kvasir.store import pool_wire as wire
from kvasir.store.messenger.tcp_server import keep_alive

if TYPE_CHECKING:
    from kvasir.store.mempool import Bytes, MemPool

A = TypeVar("A", bound=wire.Message)

PULL_SHARE = 0.8
"""Of our wait for a transfer; the peer gives up before we do, so that we hear why."""


class Receiver(Protocol):
    """A pool that blocks can be transferred to: a MemPool or a RemotePool. What each call raises is PoolError."""

    @property
    def block_bytes(self) -> int: ...

    def alloc(self, num_blocks: int) -> tuple[int, ...]: ...

    def free(self, addresses: Sequence[int]) -> None: ...

    def receive(self, giver: MemPool, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy the giver's blocks `source`, which it keeps as they are meanwhile, into allocated blocks `target` here."""
        ...

    def insert(self, keys: Sequence[BlockKey], addresses: Sequence[int]) -> None: ...

    def exists(self, key: BlockKey) -> Tier | None: ...


class RemotePool:
    """One connection to one incarnation of a pool. Any thread may call; calls take turns.

    Every call raises PoolError, naming the pool, when it refuses, is gone or does not answer within `timeout_s`. After the
    latter two the connection has ended, for good: the pool frees what was allocated over it, and addresses of before mean
    nothing to it any more. Open another one then.
    """

    def __init__(self, address: str, *, timeout_s: float = 30.0):
        """`address` is the `address` of a MemPool. Raises ConfigError when it is none."""
        self.address = address
        self.block_bytes = 0
        self._timeout_s = timeout_s
        self._turn = threading.Lock()
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.create_connection(wire.split_address(address), timeout=timeout_s)
        except OSError as error:
            raise self._error(f"cannot be reached: {error.strerror or error}") from error
        keep_alive(self._socket)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            welcome = self._ask(None, wire.Welcome)
            if welcome.version != wire.VERSION:
                raise self._error(f"speaks version {welcome.version}, not version {wire.VERSION} of ours")
        except PoolError:
            self.close()
            raise
        self.block_bytes = welcome.block_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the pool frees what was allocated over it and not inserted."""
        with self._turn:
            self._end()

    def alloc(self, num_blocks: int) -> tuple[int, ...]:
        """Addresses there, for `receive` and `insert`. All or PoolError. They are freed if nothing is said for a minute."""
        return self._ask(wire.Alloc(num_blocks), wire.Allocated).addresses

    def free(self, addresses: Sequence[int]) -> None:
        """Give allocated blocks back, unused. The end of the connection has done so already."""
        if addresses and self._socket is not None:
            self._ask(wire.Free(tuple(addresses)), wire.Done)

    def receive(self, giver: MemPool, source: Sequence[int], target: Sequence[int]) -> None:
        """See Receiver. Between machines, the giver must have been made with `listen`."""
        within_ms = max(1, min(int(self._timeout_s * PULL_SHARE * 1000), wire.MAX_WAIT_MS))
        self._ask(wire.Receive(giver.peer, tuple(source), tuple(target), within_ms), wire.Done)

    def insert(self, keys: Sequence[BlockKey], addresses: Sequence[int]) -> None:
        """Make received blocks readable there. If no answer comes, they may be readable or not."""
        self._ask(wire.Insert(tuple(keys), tuple(addresses)), wire.Done)

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Blocks of the longest prefix of `keys` that can be read there now, from DRAM or the SSD. Nothing keeps them there."""
        return self._ask(wire.Match(tuple(keys)), wire.Matched).num_blocks

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget blocks there, in DRAM and on the SSD, except leased ones."""
        self._ask(wire.Delete(tuple(keys)), wire.Done)

    def put(self, key: BlockKey, value: npt.NDArray[np.generic]) -> None:
        """Copy one block in: `value` has block_bytes bytes, of any dtype and shape. For many, `transfer_with_insert`."""
        self._ask(wire.Put(key, value.tobytes()), wire.Done)

    def get(self, key: BlockKey) -> Bytes:
        """A copy of one block, from DRAM or the SSD there, uint8 [block_bytes]."""
        value = np.frombuffer(self._ask(wire.Get(key), wire.Block).value, np.uint8)
        if len(value) != self.block_bytes:
            raise self._error(f"sent a block of {len(value)} bytes, expected {self.block_bytes}")
        return value

    def exists(self, key: BlockKey) -> Tier | None:
        """The fastest tier there that has the block."""
        return self._ask(wire.Exists(key), wire.Found).tier

    def _ask(self, request: wire.Request | None, expected: type[A]) -> A:
        """Say it and wait for the answer. After any failure in between nobody knows what comes next, so that is the end."""
        with self._turn:
            if self._socket is None:
                raise self._error("has lost this connection; open another one")
            try:
                answer = self._exchange(self._socket, request)
            except BaseException as error:
                self._end()
                if isinstance(error, TimeoutError):
                    raise self._error(f"did not answer within {self._timeout_s:g} s") from None
                if isinstance(error, OSError):
                    raise self._error(f"is gone: {error.strerror}") from error
                if isinstance(error, PoolError):
                    raise self._error(str(error)) from error
                raise
        if isinstance(answer, wire.Failed):
            raise self._error(answer.message)
        if not isinstance(answer, expected):
            self.close()
            raise self._error(f"answered {type(answer).__name__}, expected {expected.__name__}")
        return answer

    def _exchange(self, connected: socket.socket, request: wire.Request | None) -> wire.Answer:
        deadline_s = time.monotonic() + self._timeout_s
        if request is not None:
            connected.settimeout(self._timeout_s)
            connected.sendall(wire.pack(request))
        header = _receive(connected, wire.LENGTH.size, deadline_s)
        length = wire.length_of(header, wire.MAX_MESSAGE_BYTES + self.block_bytes)
        return wire.unpack(wire.ANSWERS, _receive(connected, length, deadline_s))

    def _end(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _error(self, why: str) -> PoolError:
        return PoolError(f"pool at {self.address}: {why}")


def _receive(connected: socket.socket, nbytes: int, deadline_s: float) -> bytearray:
    raw = bytearray(nbytes)
    got = 0
    while got < nbytes:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        connected.settimeout(left_s)
        step = connected.recv_into(memoryview(raw)[got:])
        if not step:
            raise PoolError("is gone")
        got += step
    return raw
