"""Lets RemotePools of other processes and machines use a MemPool: an event loop on a thread of its own.

The server pulls what others transfer to it, so that nobody else writes into its memory: when a pull has ended, however it
ended, its blocks may be freed at once. A connection owns what was allocated over it; when it ends, or leaves that unfinished
for UNFINISHED_S, it is freed. A client inserts blocks only after it heard that the pull is complete, and keeps their source
until then: what becomes visible is right.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np
import structlog
import uvloop

from kvasir.core.errors import ConfigError, PoolError, TransferError
from kvasir.store import pool_wire as wire
from kvasir.store.arena import Arena
from kvasir.store.messenger import Fetch, Messenger, ShmTransport, Source, TcpServer, TcpTransport, Transport, host_identity
from kvasir.store.messenger.tcp_server import keep_alive

if TYPE_CHECKING:
    from kvasir.store.mempool import MemPool

MAX_CONNECTIONS = 256
UNFINISHED_S = 60.0
"""Allocated blocks wait so long for their sender's next word, and an answer for its reader."""


class PoolServer:
    """`address` is the HOST:PORT for RemotePool, `data_address` that for reading the arena over TCP.

    Whoever reaches the ports may use the pool: they belong on the cluster's own network.
    """

    def __init__(self, pool: MemPool, arena: Arena, listen: str):
        """Serve until `close`. Raises ConfigError when it cannot listen there."""
        self._pool = pool
        self._arena = arena
        host, port = wire.split_address(listen)
        if host == "0.0.0.0":
            raise ConfigError(f"cannot listen on {listen}: give the address at which others reach this machine")
        started: Future[tuple[str, str]] = Future()
        self._thread = threading.Thread(target=self._run, args=(host, port, started), name="mempool-server", daemon=True)
        self._thread.start()
        self.address, self.data_address = started.result()

    def close(self) -> None:
        """End all connections and free what they hold."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self, host: str, port: int, started: Future[tuple[str, str]]) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                self._loop = runner.get_loop()
                self._task = self._loop.create_task(self._serve(host, port, started))
                with contextlib.suppress(asyncio.CancelledError):
                    self._loop.run_until_complete(self._task)
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _serve(self, host: str, port: int, started: Future[tuple[str, str]]) -> None:
        try:
            listening = socket.create_server((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen for pools on {host}:{port}: {error.strerror}") from error
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(listening)
            data = await TcpServer.start(self._arena, host)
            stack.push_async_callback(data.close)
            transports: list[Transport] = [ShmTransport(self._arena), TcpTransport(self._arena)]
            messenger = Messenger("here", transports, slot_bytes=self._pool.block_bytes, num_layers=1)
            stack.push_async_callback(messenger.close)
            connections = await stack.enter_async_context(asyncio.TaskGroup())
            serving = set[_Connection]()

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                connection = _Connection(self._pool, messenger, reader, writer)
                serving.add(connection)
                task = connections.create_task(connection.serve(is_welcome=len(serving) <= MAX_CONNECTIONS))
                task.add_done_callback(lambda _: serving.discard(connection))

            server = await asyncio.start_server(accept, sock=listening)
            stack.callback(server.close)
            name, chosen = listening.getsockname()
            started.set_result((f"{name}:{chosen}", data.address))
            await asyncio.Event().wait()  # until this is cancelled


class _Connection:
    """One client: a request, its answer, the next request."""

    def __init__(self, pool: MemPool, messenger: Messenger, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._pool = pool
        self._messenger = messenger
        self._reader = reader
        self._writer = writer
        self._held = set[int]()
        self._complete = set[int]()  # those of the held ones that have all their bytes

    async def serve(self, *, is_welcome: bool) -> None:
        """Until it ends or breaks the rules; nothing that it held is left then."""
        try:
            keep_alive(self._writer.get_extra_info("socket"))
            self._writer.transport.set_write_buffer_limits(0)  # what is drained has gone to the kernel
            if not is_welcome:
                await self._say(wire.Failed(f"the pool has {MAX_CONNECTIONS} connections and takes no more"))
                return
            await self._say(wire.Welcome(wire.VERSION, self._pool.block_bytes))
            while True:
                await self._say(await self._answer(await self._next()))
        except (OSError, EOFError, PoolError):
            pass  # it is gone, silent, or not one of us
        except Exception:  # harms nobody else
            structlog.get_logger().bind(part="pool server").exception("connection failed")
        finally:
            self._pool.free(tuple(self._held))
            self._writer.transport.abort()

    async def _next(self) -> wire.Request:
        async with asyncio.timeout(UNFINISHED_S if self._held else None):
            header = await self._reader.readexactly(wire.LENGTH.size)
            length = wire.length_of(header, wire.MAX_MESSAGE_BYTES + self._pool.block_bytes)
            return wire.unpack(wire.REQUESTS, await self._reader.readexactly(length))

    async def _say(self, message: wire.Answer) -> None:
        self._writer.write(wire.pack(message))
        async with asyncio.timeout(UNFINISHED_S):
            await self._writer.drain()

    async def _answer(self, request: wire.Request) -> wire.Answer:
        try:
            match request:
                case wire.Alloc(num_blocks):
                    addresses = self._pool.alloc(num_blocks)
                    self._held.update(addresses)
                    return wire.Allocated(addresses)
                case wire.Free(addresses):
                    self._require(addresses, self._held)
                    self._pool.free(addresses)
                    self._let_go(addresses)
                case wire.Receive():
                    await self._receive(request)
                case wire.Insert(keys, addresses):
                    self._require(addresses, self._complete)
                    self._pool.insert(keys, addresses)
                    self._let_go(addresses)
                case wire.Match(keys):
                    with self._pool.match(keys) as found:
                        return wire.Matched(len(found) + found.on_ssd)
                case wire.Delete(keys):
                    self._pool.delete(keys)
                case wire.Put(key, raw):
                    await asyncio.to_thread(self._pool.put, key, np.frombuffer(raw, np.uint8))  # which may wait for the SSD
                case wire.Get(key):
                    value = await asyncio.to_thread(self._pool.get, key)  # it may have to be read from the SSD
                    return wire.Block(value.tobytes())
                case wire.Exists(key):
                    return wire.Found(self._pool.exists(key))
        except (PoolError, TransferError) as error:
            return wire.Failed(str(error))
        return wire.Done()

    async def _receive(self, request: wire.Receive) -> None:
        self._require(request.target, self._held)
        if request.giver.arena.slot_bytes != self._pool.block_bytes or len(request.source) != len(request.target):
            raise PoolError("blocks do not fit each other")
        if request.giver.tcp is None and request.giver.host != host_identity():
            raise PoolError("the giver is on another machine and has no address; make it with listen=")
        self._complete.difference_update(request.target)
        source = Source(request.giver, request.source)
        deadline_s = asyncio.get_running_loop().time() + request.within_ms / 1000
        await self._messenger.fetch(Fetch((source,), request.target, deadline_s))
        self._complete.update(request.target)

    def _require(self, addresses: Sequence[int], those: set[int]) -> None:
        if bad := sorted(set(addresses) - those):
            raise PoolError(f"addresses {bad} are not allocated over this connection, or did not come completely")

    def _let_go(self, addresses: Sequence[int]) -> None:
        self._held.difference_update(addresses)
        self._complete.difference_update(addresses)
