"""TCP transfers against peers that lie, stall and die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.core.errors import ConfigError, TransferError
from kvasir.store.messenger import PeerArena, Priority, SpanPair, TcpLimits, TcpServer, TcpTransport, host_identity
from kvasir.store.messenger import tcp_wire as wire
from kvasir.store.messenger.tcp_channel import Channel
from tests.store.messenger.beds import LIMITS, NUM_SLOTS, SLOT_BYTES, Bed, bed, expected, filled, soon, tcp, tcp_bed
from tests.store.stopping import stop

ALL = [SpanPair(slot, slot, 0, SLOT_BYTES) for slot in range(NUM_SLOTS)]

OTHER_PROCESS = """
import asyncio, sys, msgspec, numpy as np
from kvasir.store.arena import create_arena
from kvasir.store.messenger import PeerArena, TcpServer, host_identity

async def main():
    arena = create_arena(NUM_SLOTS, SLOT_BYTES)
    arena.memory[:] = 7
    server = await TcpServer.start(arena, "127.0.0.1")
    peer = PeerArena("other", arena.handle, host_identity(), tcp=server.address)
    print(msgspec.json.encode(peer).decode(), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
""".replace("NUM_SLOTS", str(NUM_SLOTS)).replace("SLOT_BYTES", str(SLOT_BYTES))


@contextmanager
def other_process() -> Iterator[tuple[subprocess.Popen[bytes], PeerArena]]:
    with subprocess.Popen([sys.executable, "-c", OTHER_PROCESS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process, msgspec.json.decode(process.stdout.readline(), type=PeerArena)
        finally:
            process.kill()


@asynccontextmanager
async def lying_server(
    lie: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[PeerArena]:
    """Somebody else's server on the port that a node announced."""
    arena = filled(3)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await lie(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    host, port = server.sockets[0].getsockname()
    async with server:
        yield PeerArena("liar", arena.handle, host_identity(), tcp=f"{host}:{port}")
    arena.close()


async def say(it: Bed, *parts: bytes) -> bytes:
    """What the server answers to these bytes until it hangs up."""
    reader, writer = await asyncio.open_connection(*it.server.address.split(":"))
    try:
        async with asyncio.timeout(10):
            writer.write(b"".join(parts))
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_both_ends_send_without_pacing_and_notice_a_dead_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[socket.socket] = []
    init = Channel.__init__

    def noting(channel: Channel, sock: socket.socket, *others: Any) -> None:
        ends.append(sock)
        init(channel, sock, *others)

    monkeypatch.setattr(Channel, "__init__", noting)
    async with bed(tcp) as it:
        await it.transport.read(it.peer, ALL, deadline_s=soon())
        assert len(ends) >= 2
        for end in ends:
            assert not end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"bbr")
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def request(op: int, pieces: list[SpanPair], *, nbytes: int | None = None, ticket: bytes = wire.NO_TICKET) -> bytes:
    nbytes = sum(piece.length for piece in pieces) if nbytes is None else nbytes
    return wire.pack_request(wire.Op(op), 1, pieces, nbytes, ticket)


@settings(max_examples=40, deadline=None)
@given(junk=st.binary(min_size=wire.HELLO.size, max_size=4000), has_hello=st.booleans())
def test_a_server_hangs_up_on_garbage_and_goes_on_serving_others(junk: bytes, has_hello: bool) -> None:
    async def check() -> None:
        async with bed(tcp, stall_s=0.1) as it:
            before = it.source.memory.copy()
            hello = wire.pack_hello(it.source.handle.id) if has_hello else b""
            answer = await say(it, hello, junk)
            assert len(answer) <= wire.WELCOME.size + wire.ANSWER.size, "no byte of the arena"
            assert it.server.counts.refused or it.server.counts.stalled
            assert np.array_equal(it.source.memory, before)
            await it.transport.read(it.peer, ALL, deadline_s=soon())
            assert it.server.num_connections <= LIMITS.streams

    asyncio.run(check())


@pytest.mark.parametrize(
    ("pieces", "nbytes", "code"),
    [
        ([SpanPair(NUM_SLOTS, 0, 0, 1)], None, wire.Code.OUT_OF_RANGE),
        ([SpanPair(0, 0, 0, 1), SpanPair(0, 0, 1, SLOT_BYTES)], None, wire.Code.OUT_OF_RANGE),
        ([SpanPair((1 << 64) - 1, 0, 0, 1)], None, wire.Code.OUT_OF_RANGE),
        ([SpanPair(0, 0, (1 << 64) - 1, 1)], None, wire.Code.OUT_OF_RANGE),
        ([SpanPair(0, 0, 0, 0)], None, wire.Code.OUT_OF_RANGE),
        ([SpanPair(0, 0, 0, 10)], 11, wire.Code.GARBLED),
        ([SpanPair(0, 0, 0, 10)], 1 << 40, wire.Code.GARBLED),
    ],
)
async def test_a_server_refuses_places_that_are_not_there(pieces: list[SpanPair], nbytes: int | None, code: wire.Code) -> None:
    async with tcp_bed() as it:
        answer = await say(it, wire.pack_hello(it.source.handle.id), request(1, pieces, nbytes=nbytes))
        assert answer[wire.WELCOME.size :] == wire.pack_answer(
            code, 0 if code == wire.Code.GARBLED and nbytes == 1 << 40 else 1, 0
        )
        assert it.server.counts.refused == {code.name.lower(): 1}


async def test_a_server_with_all_its_connections_in_use_says_so() -> None:
    source, target = filled(1), filled(2)
    server = await TcpServer.start(source, "127.0.0.1", max_connections=1)
    peer = PeerArena("busy", source.handle, host_identity(), tcp=server.address)
    first, second = TcpTransport(target, LIMITS), TcpTransport(target, LIMITS)
    await first.read(peer, ALL, deadline_s=soon())  # a second stream was refused, one is enough
    with pytest.raises(TransferError, match="as many connections as it takes") as raised:
        await second.read(peer, ALL, deadline_s=soon())
    assert raised.value.cause == "refused"
    await first.close()
    await second.close()
    await server.close()


async def test_a_port_in_use_is_a_config_error() -> None:
    async with tcp_bed() as it:
        with pytest.raises(ConfigError, match="cannot listen for transfers on"):
            await TcpServer.start(it.source, "127.0.0.1", int(it.server.address.split(":")[1]))


async def test_nobody_at_the_address_is_refused() -> None:
    async with tcp_bed() as it:
        await it.server.close()
        with pytest.raises(TransferError) as raised:
            await it.transport.read(it.peer, ALL, deadline_s=soon())
        assert raised.value.cause in ("refused", "cut")


@pytest.mark.parametrize("junk", [b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100, b"\0" * 200])
async def test_a_server_of_another_protocol_is_garbled(junk: bytes) -> None:
    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(junk)
        await writer.drain()
        await reader.read()

    async with lying_server(lie) as peer:
        target = filled(2)
        with pytest.raises(TransferError) as raised:
            await TcpTransport(target, LIMITS).read(peer, ALL, deadline_s=soon())
        assert raised.value.cause == "garbled"


@settings(max_examples=30, deadline=None)
@given(answer=st.binary(min_size=wire.ANSWER.size, max_size=200), is_flood=st.booleans())
def test_whatever_a_server_answers_only_the_spans_of_the_read_are_written(answer: bytes, is_flood: bool) -> None:
    spans = [SpanPair(1, 4, 1000, 5000), SpanPair(2, 6, 0, 70_000)]

    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arena_id = (await reader.readexactly(wire.HELLO.size))[-16:]
        assert arena_id == peers[0].arena.id
        writer.write(wire.pack_welcome(wire.Code.OK, peers[0].arena))
        await reader.readexactly(wire.REQUEST.size)
        writer.write(answer + b"z" * 300_000 * is_flood)
        await writer.drain()

    peers: list[PeerArena] = []

    async def check() -> None:
        async with lying_server(lie) as peer:
            peers[:] = [peer]
            target = filled(2)
            free = np.ones(target.memory.nbytes, dtype=bool)
            for span in spans:
                start = span.local_slot * target.stride + span.offset
                free[start : start + span.length] = False
            before = target.memory[free].copy()
            transport = TcpTransport(target, LIMITS)
            with pytest.raises(TransferError) as raised:
                await transport.read(peer, spans, deadline_s=soon(5.0))
            assert raised.value.cause in ("garbled", "cut", "stalled", "refused", "out_of_range", "stale_arena")
            assert np.array_equal(target.memory[free], before)
            await transport.close()
            target.close()

    asyncio.run(check())


async def test_bytes_that_nobody_asked_for_end_the_connection() -> None:
    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(wire.HELLO.size)
        writer.write(wire.pack_welcome(wire.Code.OK, peers[0].arena))
        raw = await reader.readexactly(wire.REQUEST.size + wire.PLACE.size)
        number = wire.unpack_request(raw[: wire.REQUEST.size]).number
        writer.write(wire.pack_answer(wire.Code.OK, number, 8) + b"12345678" + b"unasked" * 100)
        await writer.drain()
        await reader.read()

    peers: list[PeerArena] = []
    async with lying_server(lie) as peer:
        peers.append(peer)
        target = filled(2)
        transport = TcpTransport(target, LIMITS)
        await transport.read(peer, [SpanPair(0, 3, 0, 8)], deadline_s=soon())
        assert bytes(target.slot(3)[:8]) == b"12345678"
        before = target.memory.copy()
        await asyncio.sleep(0.02)
        assert np.array_equal(target.memory, before)
        await transport.close()


async def test_a_peer_killed_in_the_middle_cuts_the_read_at_once() -> None:
    target = filled(2)
    transport = TcpTransport(target, LIMITS)
    with other_process() as (process, peer):

        def on_part(_: int) -> None:
            process.kill()

        with pytest.raises(TransferError) as raised:
            await transport.read(peer, ALL * 20, deadline_s=soon(), on_part=on_part)
        assert raised.value.cause in ("cut", "refused")
    await transport.close()


async def test_a_peer_that_stops_is_noticed_long_before_the_deadline_and_its_late_bytes_go_nowhere() -> None:
    target = filled(2)
    transport = TcpTransport(target, LIMITS)
    loop = asyncio.get_running_loop()
    with other_process() as (process, peer):
        await transport.read(peer, ALL, deadline_s=soon())
        stop(process.pid)
        started_s = loop.time()
        with pytest.raises(TransferError) as raised:
            await transport.read(peer, ALL, deadline_s=soon(60.0))
        assert raised.value.cause == "stalled"
        assert loop.time() - started_s < 10 * LIMITS.stall_s
        target.memory[:] = 3
        process.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.1)
        assert (target.memory == 3).all()
        await transport.read(peer, ALL, deadline_s=soon())
        assert (target.slot(5) == 7).all()
    await transport.close()


@settings(max_examples=15, deadline=None)
@given(
    patience_s=st.floats(0.0, 0.1),
    stopped_after_s=st.floats(0.0, 0.02),
    is_cancelled=st.booleans(),
)
def test_a_read_from_a_stopped_peer_ends_at_its_deadline_and_then_nobody_writes(
    patience_s: float, stopped_after_s: float, is_cancelled: bool
) -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        target = filled(2)
        transport = TcpTransport(target, LIMITS)
        with other_process() as (process, peer):
            loop.call_later(stopped_after_s, process.send_signal, signal.SIGSTOP)
            deadline_s = loop.time() + (60.0 if is_cancelled else patience_s)
            task = asyncio.create_task(transport.read(peer, ALL * 20, deadline_s=deadline_s))
            if is_cancelled:
                loop.call_later(patience_s, task.cancel)
            ended_at = loop.time() + patience_s
            await asyncio.gather(task, return_exceptions=True)
            assert loop.time() - ended_at < 2.0
            target.memory[:] = 3
            os.kill(process.pid, signal.SIGCONT)
            await asyncio.sleep(0.02)
            assert (target.memory == 3).all()
        await transport.close()
        target.close()

    asyncio.run(check())


async def test_a_client_that_does_not_read_is_dropped() -> None:
    async with bed(tcp, stall_s=0.2) as it:
        reader, writer = await asyncio.open_connection(*it.server.address.split(":"), limit=1024)
        piece = [SpanPair(0, 0, 0, SLOT_BYTES)]
        writer.write(wire.pack_hello(it.source.handle.id) + request(1, piece) * 200)
        await asyncio.wait_for(writer.drain(), 5)
        for _ in range(100):
            if it.server.counts.stalled:
                break
            await asyncio.sleep(0.05)
        assert it.server.counts.stalled == 1
        assert it.server.num_connections == 0
        assert reader is not None
        writer.close()


async def test_an_idle_connection_is_kept_and_then_given_up_by_the_client() -> None:
    source, target = filled(1), filled(2)
    server = await TcpServer.start(source, "127.0.0.1", stall_s=0.05)
    peer = PeerArena("source", source.handle, host_identity(), tcp=server.address)
    transport = TcpTransport(target, TcpLimits(slice_bytes=1 << 16, stall_s=0.05, idle_s=0.4))
    await transport.read(peer, ALL, deadline_s=soon())
    await asyncio.sleep(0.2)
    assert server.num_connections == 2
    for _ in range(100):
        if not server.num_connections:
            break
        await asyncio.sleep(0.05)
    assert server.num_connections == 0
    assert server.counts.stalled == 0
    await transport.read(peer, ALL, deadline_s=soon())
    await transport.close()
    await server.close()


async def test_a_hand_off_passes_a_long_fetch() -> None:
    async with tcp_bed() as it:
        order: list[str] = []

        async def read(name: str, spans: list[SpanPair], priority: Priority) -> None:
            await it.transport.read(it.peer, spans, deadline_s=soon(), priority=priority)
            order.append(name)

        async with asyncio.TaskGroup() as group:
            group.create_task(read("replication", ALL, Priority.REPLICATION))
            group.create_task(read("fetch", ALL, Priority.FETCH))
            await asyncio.sleep(0.001)
            group.create_task(read("hand-off", ALL[:2], Priority.HAND_OFF))
        assert order == ["hand-off", "fetch", "replication"]


async def test_short_reads_of_a_class_do_not_wait_for_the_end_of_a_long_one() -> None:
    async with tcp_bed() as it:
        parts: list[int] = []
        async with asyncio.TaskGroup() as group:
            group.create_task(it.transport.read(it.peer, ALL, deadline_s=soon(), on_part=parts.append))
            await asyncio.sleep(0)
            await it.transport.read(it.peer, ALL[:1], deadline_s=soon())
            assert not parts or parts[-1] < NUM_SLOTS // 2, "it had its turns between the slices of the long one"


async def test_a_push_arrives_in_granted_slots_and_nowhere_else() -> None:
    async with tcp_bed() as it:
        assert isinstance(it.transport, TcpTransport)
        spans = [SpanPair(slot, slot + 3, 0, SLOT_BYTES) for slot in (2, 9, 4)]
        ticket = it.server.grant([2, 4, 9])
        mirrored = [SpanPair(local, remote, offset, length) for remote, local, offset, length in spans]
        after = expected(it.source.memory, it.target, mirrored)
        await it.transport.push(it.peer, spans, ticket=ticket, deadline_s=soon())
        assert np.array_equal(it.source.memory, after)
        assert it.server.counts.received_bytes == 3 * SLOT_BYTES


async def test_a_push_without_a_grant_is_refused_and_writes_nothing() -> None:
    async with tcp_bed() as it:
        assert isinstance(it.transport, TcpTransport)
        before = it.source.memory.copy()
        ticket = it.server.grant([2])
        for spans in ([SpanPair(3, 3, 0, SLOT_BYTES)], [SpanPair(2, 2, 0, 10), SpanPair(3, 3, 0, 10)]):
            with pytest.raises(TransferError, match="did not grant"):
                await it.transport.push(it.peer, spans, ticket=ticket, deadline_s=soon())
        it.server.revoke(ticket)
        with pytest.raises(TransferError, match="did not grant"):
            await it.transport.push(it.peer, [SpanPair(2, 2, 0, 10)], ticket=ticket, deadline_s=soon())
        assert np.array_equal(it.source.memory, before)


async def test_after_a_revoke_a_push_under_way_writes_no_more() -> None:
    async with tcp_bed() as it:
        ticket = it.server.grant([2])
        reader, writer = await asyncio.open_connection(*it.server.address.split(":"))
        writer.write(
            wire.pack_hello(it.source.handle.id) + request(2, [SpanPair(2, 0, 0, SLOT_BYTES)], ticket=ticket) + b"p" * 1000
        )
        await reader.readexactly(wire.WELCOME.size)
        for _ in range(200):
            if it.source.slot(2)[0] == ord("p"):
                break
            await asyncio.sleep(0.01)
        it.server.revoke(ticket)
        it.source.memory[:] = 1
        writer.write(b"p" * 1000)
        await asyncio.sleep(0.05)
        assert (it.source.memory == 1).all()
        assert it.server.counts.revoked == 1
        writer.close()


def test_every_span_is_cut_into_slices_without_gap_or_overlap() -> None:
    from kvasir.store.messenger.spans import cut

    spans = [SpanPair(1, 2, 5, 1000), SpanPair(3, 4, 0, 7), SpanPair(5, 6, 10, 64)]
    slices = list(cut(spans, max_bytes=100, max_pieces=2))
    pieces = [piece for one in slices for piece in one.pieces]
    assert [one.number for one in slices] == list(range(len(slices)))
    assert all(one.nbytes == sum(piece.length for piece in one.pieces) <= 100 and len(one.pieces) <= 2 for one in slices)
    assert slices[-1].whole == 3
    assert [one.whole for one in slices] == sorted(one.whole for one in slices)
    for slot, offset, length in ((2, 5, 1000), (4, 0, 7), (6, 10, 64)):
        mine = [(piece.offset, piece.offset + piece.length) for piece in pieces if piece.local_slot == slot]
        assert mine[0][0] == offset
        assert mine[-1][1] == offset + length
        assert all(end == start for (_, end), (start, _) in pairwise(mine))


def test_the_frames_have_the_sizes_that_the_protocol_says() -> None:
    assert struct.calcsize("<QQQ") == wire.PLACE.size
    assert (wire.HELLO.size, wire.WELCOME.size, wire.REQUEST.size, wire.ANSWER.size) == (32, 56, 40, 24)
