"""Message channels between processes: one listener with many named peers, and the channel of one peer to it.

A frame is one msgpack-encoded tagged Struct. Sending never waits: it returns False when the peer is unknown or its queue is
full, and the sender decides what that means. A frame that does not decode is counted in `dropped` and forgotten, so that a
peer that speaks garbage harms nobody but itself. Order holds between two ends and nothing is sent twice;
what is on its way when an end dies is lost.
"""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec
import zmq

from kvasir.core.address import host_and_port
from kvasir.core.errors import ClusterError, ConfigError

HIGH_WATER_MARK = 4096
"""Messages that may wait in one direction of one channel; a step's tokens are one message, so this is seconds of work."""

MAX_MESSAGE_BYTES = 64 << 20
"""A prompt of a million tokens takes 4 MiB; whatever is larger than this is garbage, and libzmq hangs up on it."""

LONGEST_IPC_PATH = 107
"""Bytes of `sun_path` in a Linux unix socket address, without its final zero."""

MALFORMED = (ValueError, RecursionError, msgspec.DecodeError)
"""What decoding garbage raises: wrong frames or names, absurd nesting, bytes that are no message."""

YIELD_AFTER = 64
"""Messages that `recv` hands out without letting other tasks run."""

In_co = TypeVar("In_co", covariant=True)
Out_contra = TypeVar("Out_contra", contravariant=True)
In = TypeVar("In")
Out = TypeVar("Out")


class Listener(Protocol[In_co, Out_contra]):
    """The end that many peers connect to. One task at a time may be in `recv`."""

    @property
    def dropped(self) -> int: ...

    async def recv(self) -> tuple[str, In_co]:
        """The next message and the name of the peer that sent it."""
        ...

    def send(self, peer: str, message: Out_contra) -> bool:
        """Queue a message without waiting; False when the peer is unknown or gone, or its queue is full."""
        ...

    def close(self) -> None: ...


class Channel(Protocol[In_co, Out_contra]):
    """The end of one named peer. One task at a time may be in `recv`."""

    @property
    def dropped(self) -> int: ...

    async def recv(self) -> In_co: ...

    def send(self, message: Out_contra) -> bool:
        """Queue a message without waiting, also before the listener is up; False when the queue is full."""
        ...

    def close(self) -> None: ...


def make_runtime_directory() -> Path:
    """A new directory, readable by this user alone, for the sockets of one cluster."""
    return Path(tempfile.mkdtemp(prefix="kvasir-", dir=os.environ.get("XDG_RUNTIME_DIR")))


def ipc_address(directory: Path, name: str) -> str:
    """The address of a unix socket in a private directory. Raises ConfigError when others could reach or replace it."""
    path = directory / f"{name}.sock"
    if len(os.fsencode(path)) > LONGEST_IPC_PATH:
        raise ConfigError(f"socket path has {len(os.fsencode(path))} bytes, at most {LONGEST_IPC_PATH} work: {path}")
    found = directory.stat()
    if stat.S_IMODE(found.st_mode) & 0o077 or found.st_uid != os.getuid():
        raise ConfigError(f"runtime directory is not private to this user: {directory}; expected mode 0700")
    return f"ipc://{path}"


def tcp_address(host: str, port: int) -> str:
    """An address for peers on other machines; port 0 lets the listener choose (see its `address`)."""
    return f"tcp://{host}:{port}"


def split_address(name: str, address: str) -> tuple[str, int]:
    """HOST:PORT of the setting `name`. Raises ConfigError."""
    found = host_and_port(address)
    if found is None:
        raise ConfigError(f"--{name} must be HOST:PORT, got {address!r}")
    return found


class ZmqListener(Generic[In, Out]):
    """A listener over a ZeroMQ ROUTER. A peer that comes back under its name takes the name over from its dead self."""

    def __init__(self, address: str, decoder: msgspec.msgpack.Decoder[In], *, high_water_mark: int = HIGH_WATER_MARK):
        self._frames = Frames(zmq.ROUTER, high_water_mark)
        self._frames.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._frames.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self.dropped = 0
        self.address = self.listen_too(address)

    def listen_too(self, address: str) -> str:
        """Listen on another address as well; returns it with the port that was chosen. Raises ClusterError."""
        try:
            self._frames.socket.bind(address)
        except zmq.ZMQError as error:
            self._frames.close()
            raise ClusterError(f"cannot listen on {address}: {error}") from error
        return self._frames.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def recv(self) -> tuple[str, In]:
        while True:
            frames = await self._frames.recv()
            try:
                name, payload = frames
                return name.decode(), self._decoder.decode(payload)
            except MALFORMED:
                self.dropped += 1

    def send(self, peer: str, message: Out) -> bool:
        return self._frames.send([peer.encode(), self._encoder.encode(message)])

    def close(self) -> None:
        self._frames.close()


class ZmqChannel(Generic[In, Out]):
    """A channel over a ZeroMQ DEALER. It connects when the listener is up and reconnects by itself."""

    def __init__(
        self, address: str, name: str, decoder: msgspec.msgpack.Decoder[In], *, high_water_mark: int = HIGH_WATER_MARK
    ):
        self._frames = Frames(zmq.DEALER, high_water_mark)
        self._frames.socket.setsockopt(zmq.IDENTITY, name.encode())
        self._frames.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._frames.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self.dropped = 0
        self._frames.socket.connect(address)

    async def recv(self) -> In:
        while True:
            frames = await self._frames.recv()
            try:
                (payload,) = frames
                return self._decoder.decode(payload)
            except MALFORMED:
                self.dropped += 1

    def send(self, message: Out) -> bool:
        return self._frames.send([self._encoder.encode(message)])

    def close(self) -> None:
        self._frames.close()


class Frames:
    """Non-blocking frames over a ZeroMQ socket on the running event loop.

    ZeroMQ's file descriptor is edge-triggered and any call can swallow the edge, so whoever touches the socket looks at its
    events afterwards (`_wake_reader`). `zmq.asyncio` does the same behind a future per call, which costs several times more.
    """

    def __init__(self, kind: int, high_water_mark: int):
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        self.socket.setsockopt(zmq.SNDHWM, high_water_mark)
        self.socket.setsockopt(zmq.RCVHWM, high_water_mark)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._loop = asyncio.get_running_loop()
        self._readable = asyncio.Event()
        self._since_yield = 0
        self._fd = int(self.socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._wake_reader)

    async def recv(self) -> list[bytes]:
        self._since_yield += 1
        if self._since_yield >= YIELD_AFTER:
            self._since_yield = 0
            await asyncio.sleep(0)
        while True:
            self._readable.clear()
            try:
                return self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                self._since_yield = 0
                await self._readable.wait()

    def send(self, frames: list[bytes]) -> bool:
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise ClusterError(f"cannot send: {error}") from error
            return False
        finally:
            self._wake_reader()
        return True

    def close(self) -> None:
        if not self.socket.closed:
            self._loop.remove_reader(self._fd)
            self.socket.close(linger=200)

    def _wake_reader(self) -> None:
        if not self.socket.closed and int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._readable.set()
