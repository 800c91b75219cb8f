"""Through here every request comes in and every answer goes out: request id, API key, errors, the log line."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from time import monotonic
from traceback import extract_tb
from typing import Any
from uuid import uuid4

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from kvasir.gateway.auth import AdminGate, Keys
from kvasir.gateway.errors import ClientGone, reply_to
from kvasir.gateway.exchange import Exchange

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/docs", "/redoc", "/openapi.json"})
"""No API key is asked for here: probes and scrapers have none."""

ADMIN = "/admin"
"""Beneath it operators' endpoints lie, with a lock of their own."""

_CLIENT_GONE = 499
"""nginx's status for a client that closed its connection; only our log sees it."""

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class CutShort(Exception):
    """The response has begun and cannot be completed: raised so that the server cuts the connection and the client can tell."""


class Door:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, *, keys: Keys, gate: AdminGate):
        self._app = app
        self._keys = keys
        self._gate = gate
        self._log = structlog.get_logger("kvasir.gateway")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        exchange = Exchange(id=_request_id(headers.get(b"x-request-id")), arrival_s=monotonic())
        exchange.enter(scope)
        signed = _signed(send, exchange)
        try:
            self._admit(scope, headers, exchange)
            await self._app(scope, receive, signed)
        except ClientGone:
            exchange.status, exchange.code = _CLIENT_GONE, "client_gone"
        except Exception as error:  # the outermost loop of a request: whatever it is, the client gets an answer
            await self._refuse(error, exchange, signed)
        finally:
            self._note(scope, exchange)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes], exchange: Exchange) -> None:
        """Raises RequestError for whoever may not call this path."""
        path, client = scope["path"], scope.get("client")
        texts = {name: value.decode("latin-1") for name, value in headers.items()}
        if path == ADMIN or path.startswith(f"{ADMIN}/"):
            self._gate.check(
                authorization=texts.get(b"authorization"),
                client=client[0] if client else None,
                host=texts.get(b"host"),
                is_from_a_page=b"origin" in texts,
            )
        elif path not in OPEN_PATHS:
            exchange.caller = self._keys.caller(texts.get(b"authorization"))

    async def _refuse(self, error: Exception, exchange: Exchange, send: Send) -> None:
        reply = reply_to(error)
        exchange.code = reply.code
        if reply.status == 500:
            # where, but not the message: an exception may quote what it choked on, and that may be a prompt
            where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in extract_tb(error.__traceback__)]
            self._log.error("internal error", id=exchange.id, error=type(error).__name__, where=where)
        if exchange.status is not None:
            raise CutShort from None
        await reply.send(send)

    def _note(self, scope: Scope, exchange: Exchange) -> None:
        if scope["path"] in OPEN_PATHS:
            return
        fields: dict[str, object] = {"id": exchange.id, "path": scope["path"], "status": exchange.status}
        if exchange.code is not None:
            fields["code"] = exchange.code
        if (tally := exchange.tally) is not None:
            usage = tally.usage
            fields |= {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "output_tokens": usage.output_tokens,
            }
            fields |= {"ttft_ms": _ms(tally.ttft_s), "tbt_ms": _ms(tally.tbt_s)}
        self._log.info("request", **fields, seconds=round(monotonic() - exchange.arrival_s, 4))


def _signed(send: Send, exchange: Exchange) -> Send:
    """`send`, with the request's id in the response's headers."""

    async def send_signed(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            exchange.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", exchange.id.encode())]
        await send(message)

    return send_signed


def _request_id(given: bytes | None) -> str:
    """The client's own id where it is printable and short, else a new one."""
    return given.decode() if given is not None and _REQUEST_ID.fullmatch(given) else uuid4().hex


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
