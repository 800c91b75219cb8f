"""An HTTP server inside an event loop that others own: it installs no signal handler and stops when told."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from errno import EACCES, EADDRINUSE
from math import ceil

import uvicorn
from starlette.types import ASGIApp

from kvasir.core.errors import ClusterError, ConfigError

_BACKLOG = 2048
_UNWIND_S = 2.0
"""How long cancelled answers get to release what they hold."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.is_up = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to whoever owns the loop."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


@asynccontextmanager
async def serve_http(app: ASGIApp, host: str, port: int, *, stop_timeout_s: float = 10.0) -> AsyncIterator[int]:
    """Serve `app` while the context is open; gives the port, which is a free one when `port` is 0.

    On leaving, no new connection is taken, and answers that run may go on for `stop_timeout_s`; then they are cancelled.
    Raises ConfigError when the address cannot be used.
    """
    listener = _listen(host, port)
    stop_s = max(1, ceil(stop_timeout_s))
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=stop_s,
    )
    server = _Server(config)
    # not a TaskGroup: it would wrap whatever the context's body raises
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="http-server")
    serving.add_done_callback(lambda _: server.is_up.set())
    try:
        await server.is_up.wait()
        if serving.done():
            raise ClusterError("the HTTP server stopped while it started; the log has the cause")
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving
        if tasks := server.server_state.tasks:
            await asyncio.wait(tasks, timeout=_UNWIND_S)


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ConfigError(f"cannot listen on {host}:{port}: a port is 0 to 65535; choose another with --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ConfigError(_remedy(error, host, port)) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(_remedy(error, host, port)) from None
    listener.setblocking(False)
    return listener


def _remedy(error: Exception, host: str, port: int) -> str:
    match getattr(error, "errno", None):
        case code if code == EADDRINUSE:
            return (
                f"port {port} on {host} is in use; choose another with --port, or stop what `ss -ltnp 'sport = :{port}'` names"
            )
        case code if code == EACCES:
            return f"port {port} needs privileges; choose one from 1024 with --port"
        case _:
            return f"cannot listen on {host}:{port}: {error}; choose another address with --host and --port"
