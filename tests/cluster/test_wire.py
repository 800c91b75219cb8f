"""One contract over both kinds of channels: between processes (ZeroMQ over ipc and tcp) and inside one."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import msgspec
import pytest
import zmq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvasir.cluster.lifeline import remove_runtime_directory
from kvasir.cluster.wire import (
    MALFORMED,
    Channel,
    Listener,
    ZmqChannel,
    ZmqListener,
    ipc_address,
    make_runtime_directory,
    tcp_address,
)
from kvasir.cluster.wire_memory import MemoryChannel, MemoryListener
from kvasir.core.errors import ClusterError, ConfigError

pytestmark = pytest.mark.timeout(20)

LIMIT = 16
"""High-water mark of the channels under test."""


class Ask(msgspec.Struct, frozen=True, tag=True):
    number: int


class Text(msgspec.Struct, frozen=True, tag=True):
    text: bytes


class Answer(msgspec.Struct, frozen=True, tag=True):
    number: int


FromPeer = Ask | Text
FROM_PEER: "msgspec.msgpack.Decoder[FromPeer]" = msgspec.msgpack.Decoder(FromPeer)
ANSWER = msgspec.msgpack.Decoder(Answer)


class Wires(Protocol):
    """A listener, ways to connect to it, and a way to send it anything."""

    @property
    def listener(self) -> Listener[FromPeer, Answer]: ...

    def connect(self, name: str) -> Channel[Answer, FromPeer]: ...

    def send_raw(self, name: str, payload: bytes) -> None: ...


class ZmqWires:
    def __init__(self, address: str, stack: ExitStack):
        self.listener: ZmqListener[FromPeer, Answer] = ZmqListener(address, FROM_PEER, high_water_mark=LIMIT)
        self._stack = stack
        stack.callback(self.listener.close)

    def connect(self, name: str) -> ZmqChannel[Answer, FromPeer]:
        channel: ZmqChannel[Answer, FromPeer] = ZmqChannel(self.listener.address, name, ANSWER, high_water_mark=LIMIT)
        self._stack.callback(channel.close)
        return channel

    def send_raw(self, name: str, payload: bytes) -> None:
        socket: zmq.Socket[bytes]
        with zmq.Context.instance().socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.IDENTITY, name.encode())
            socket.setsockopt(zmq.LINGER, 1000)
            socket.connect(self.listener.address)
            socket.send(payload)


class MemoryWires:
    def __init__(self) -> None:
        self.listener: MemoryListener[FromPeer, Answer] = MemoryListener(FROM_PEER, high_water_mark=LIMIT)

    def connect(self, name: str) -> MemoryChannel[Answer, FromPeer]:
        return MemoryChannel(self.listener, name, ANSWER)

    def send_raw(self, name: str, payload: bytes) -> None:
        self.listener.deliver(name, payload)


@pytest.fixture
def runtime() -> Iterator[Path]:
    directory = make_runtime_directory()
    yield directory
    remove_runtime_directory(directory)


@pytest.fixture(params=["ipc", "tcp", "memory"])
async def wires(request: pytest.FixtureRequest, runtime: Path):  # type: ignore[no-untyped-def]
    with ExitStack() as stack:
        match request.param:
            case "ipc":
                yield ZmqWires(ipc_address(runtime, "wire"), stack)
            case "tcp":
                yield ZmqWires(tcp_address("127.0.0.1", 0), stack)
            case _:
                yield MemoryWires()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_messages_arrive_in_order_under_their_sender_s_name(wires: Wires) -> None:
    channel = wires.connect("p0")
    for number in range(10):
        assert channel.send(Ask(number))
    assert [await wires.listener.recv() for _ in range(10)] == [("p0", Ask(number)) for number in range(10)]


async def test_each_peer_gets_what_is_sent_to_its_name(wires: Wires) -> None:
    channels = {name: wires.connect(name) for name in ("p0", "d0")}
    for channel in channels.values():
        channel.send(Ask(0))
    for _ in channels:
        name, _ = await wires.listener.recv()
        assert wires.listener.send(name, Answer(len(name) + ord(name[0])))
    assert await channels["d0"].recv() == Answer(2 + ord("d"))
    assert await channels["p0"].recv() == Answer(2 + ord("p"))


async def test_an_unknown_peer_cannot_be_sent_to(wires: Wires) -> None:
    assert not wires.listener.send("nobody", Answer(1))


async def test_a_peer_that_does_not_read_fills_its_own_queue_only(wires: Wires) -> None:
    lazy, busy = wires.connect("lazy"), wires.connect("busy")
    lazy.send(Ask(0))
    busy.send(Ask(0))
    await wires.listener.recv()
    await wires.listener.recv()
    big = 0
    while wires.listener.send("lazy", Answer(big)):
        big += 1
        assert big < 100_000, "the queue has no bound"
    assert wires.listener.send("busy", Answer(7))
    assert await busy.recv() == Answer(7)
    assert [await lazy.recv() for _ in range(LIMIT)] == [Answer(n) for n in range(LIMIT)]


async def test_a_listener_that_does_not_read_fills_the_sender_s_queue_and_nothing_is_lost(wires: Wires) -> None:
    channel = wires.connect("p0")
    channel.send(Text(b"first"))
    assert await wires.listener.recv() == ("p0", Text(b"first"))
    sent = 0
    while channel.send(Text(bytes(100_000))):  # larger than a socket's buffer, so that queues must hold them
        sent += 1
        assert sent < 10_000, "the queue has no bound"
    for _ in range(sent):
        await wires.listener.recv()
    await eventually(lambda: channel.send(Text(b"last")))
    assert await wires.listener.recv() == ("p0", Text(b"last"))


@pytest.mark.parametrize(
    "garbage", [b"", b"\xc1", b"GET / HTTP/1.1\r\n\r\n", msgspec.msgpack.encode(Answer(1)), b"\x91" * 5000]
)
async def test_garbage_is_counted_and_the_next_message_arrives(wires: Wires, garbage: bytes) -> None:
    wires.send_raw("vandal", garbage)
    wires.send_raw("vandal2", garbage)
    channel = wires.connect("p0")
    channel.send(Ask(1))
    message = await wires.listener.recv()
    while wires.listener.dropped < 2:
        channel.send(Ask(1))
        message = await wires.listener.recv()
    assert message == ("p0", Ask(1))


async def test_a_peer_that_comes_back_takes_its_name_over(wires: Wires) -> None:
    first = wires.connect("p0")
    first.send(Ask(1))
    await wires.listener.recv()
    second = wires.connect("p0")
    second.send(Ask(2))
    assert await wires.listener.recv() == ("p0", Ask(2))
    wires.listener.send("p0", Answer(2))
    assert await second.recv() == Answer(2)


async def test_a_closed_peer_becomes_unknown(wires: Wires) -> None:
    channel = wires.connect("p0")
    channel.send(Ask(1))
    await wires.listener.recv()
    channel.close()
    await eventually(lambda: not wires.listener.send("p0", Answer(1)))


async def test_a_flood_lets_other_tasks_run(wires: Wires) -> None:
    channel = wires.connect("p0")
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count_turns())
    received = 0
    for number in range(500):
        while not channel.send(Ask(number)):
            await wires.listener.recv()
            received += 1
    while received < 500:
        await wires.listener.recv()
        received += 1
    counter.cancel()
    assert turns >= 3


async def test_what_is_sent_before_the_listener_is_up_arrives(runtime: Path) -> None:
    address = ipc_address(runtime, "late")
    with ExitStack() as stack:
        channel: ZmqChannel[Answer, FromPeer] = ZmqChannel(address, "p0", ANSWER)
        stack.callback(channel.close)
        assert channel.send(Ask(1))
        wires = ZmqWires(address, stack)
        assert await wires.listener.recv() == ("p0", Ask(1))


async def test_a_channel_survives_a_restart_of_the_listener(runtime: Path) -> None:
    address = ipc_address(runtime, "wire")
    with ExitStack() as first_life, ExitStack() as second_life:
        wires = ZmqWires(address, first_life)
        channel: ZmqChannel[Answer, FromPeer] = ZmqChannel(address, "p0", ANSWER)
        second_life.callback(channel.close)
        channel.send(Ask(1))
        await wires.listener.recv()
        wires.listener.close()
        again = ZmqWires(address, second_life)
        async with asyncio.timeout(5):
            received = asyncio.ensure_future(again.listener.recv())
            while not received.done():  # what was on its way when the listener closed is lost
                channel.send(Ask(2))
                await asyncio.wait([received], timeout=0.02)
            assert await received == ("p0", Ask(2))


async def test_an_address_that_cannot_be_bound_is_a_cluster_error() -> None:
    with pytest.raises(ClusterError, match="cannot listen on ipc:///nowhere/at-all"):
        ZmqListener("ipc:///nowhere/at-all.sock", FROM_PEER)


def test_a_runtime_directory_is_private_and_goes_away(runtime: Path) -> None:
    assert runtime.stat().st_mode & 0o777 == 0o700
    (runtime / "hub.sock").touch()
    remove_runtime_directory(runtime)
    assert not runtime.exists()


def test_a_directory_that_others_can_reach_is_refused(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)
    with pytest.raises(ConfigError, match="not private"):
        ipc_address(tmp_path, "hub")


def test_a_directory_that_is_not_ours_is_not_removed(tmp_path: Path) -> None:
    remove_runtime_directory(tmp_path)
    assert tmp_path.exists()


def test_a_socket_path_that_is_too_long_is_refused(runtime: Path) -> None:
    with pytest.raises(ConfigError, match="at most 107"):
        ipc_address(runtime, "x" * 107)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
@example(b"\x81\xa4type\xa3Ask" + b"\x91" * 10)
@example(b"\x82\xa4type\xa3Ask\xa1x" + b"\x91" * 100_000)
def test_decoding_garbage_raises_only_what_is_caught(garbage: bytes) -> None:
    try:
        FROM_PEER.decode(garbage)
    except MALFORMED:
        return
