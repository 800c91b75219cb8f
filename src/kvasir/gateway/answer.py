"""Answers a job over HTTP: as one JSON body or as server-sent events; a client that goes away aborts it."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from time import monotonic
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvasir.core.errors import ClusterError, KvasirError
from kvasir.gateway.encoding import DONE, ChatShape, CompletionShape, Shape, Whole
from kvasir.gateway.errors import ClientGone, ErrorReply, reply_to
from kvasir.gateway.exchange import Exchange, Tally, Usage
from kvasir.gateway.generation import Backend, Choice, Piece, first_of, generate
from kvasir.gateway.job import Job

_JSON_HEADERS = [(b"content-type", b"application/json")]
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the tokens otherwise
]


class Answer(Response):
    """An ASGI response that does the work while it answers.

    Nothing is sent before the first token, so that an error until then has its own HTTP status.
    """

    def __init__(self, job: Job, backend: Backend, exchange: Exchange, *, send_timeout_s: float):
        self.status_code = 200
        self.background = None
        self._job = job
        self._exchange = exchange
        self._send_timeout_s = send_timeout_s
        self._choices = [Choice(job, index, backend) for index in range(job.n * len(job.prompts))]
        is_chat = job.id.startswith("chatcmpl")
        self._shape: Shape = (ChatShape if is_chat else CompletionShape)(job, backend.tokenizer)
        self._is_complete = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = _Sender(send)
        sink: _Sink = (_Stream if self._job.stream else _Plain)(self._job, self._shape, sender)
        try:
            async with asyncio.TaskGroup() as group:
                # both in tasks of their own: a token then wakes a short stack of awaits, not the whole of the middleware
                watcher = group.create_task(self._watch(receive, sender))
                group.create_task(self._work(sink)).add_done_callback(lambda _: watcher.cancel())
        except BaseExceptionGroup as failures:
            raise first_of(failures) from None
        except asyncio.CancelledError:  # by the HTTP server, whose time to end is over
            stopping = ClusterError("the server is stopping; send the request again")
            if not sink.has_begun:
                raise stopping from None
            if self._is_complete:  # nothing may follow the last event
                raise
            reply = reply_to(stopping)
            self._exchange.code = reply.code
            await sink.fail(reply)
        finally:
            self._tell_exchange()

    async def _watch(self, receive: Receive, sender: _Sender) -> None:
        """Returns by raising: the client closed its connection, or takes nothing off it any more."""
        while True:
            try:
                async with asyncio.timeout(self._send_timeout_s):
                    message = await receive()
            except TimeoutError:
                if sender.stalled_s() >= self._send_timeout_s:
                    raise ClientGone from None
                continue
            if message["type"] == "http.disconnect":
                break
        if not self._is_complete:
            raise ClientGone

    async def _work(self, sink: _Sink) -> None:
        try:
            await generate(self._choices, self._job.n, sink.put, arrival_s=self._exchange.arrival_s)
        except KvasirError as error:
            if not sink.has_begun:
                raise
            reply = reply_to(error)
            self._exchange.code = reply.code
            self._is_complete = True
            await sink.fail(reply)
        else:
            self._is_complete = True
            await sink.end(self._usage())

    def _usage(self) -> Usage:
        first_choices = self._choices[:: self._job.n]
        return Usage(
            prompt_tokens=self._job.num_prompt_tokens,
            cached_tokens=sum(choice.cached_tokens or 0 for choice in first_choices),
            output_tokens=sum(len(choice.token_times_s) for choice in self._choices),
        )

    def _tell_exchange(self) -> None:
        record = self._choices[0].record(self._exchange.arrival_s)
        self._exchange.tally = Tally(self._usage(), ttft_s=record.ttft_s, tbt_s=record.tbt_s)


class _Sender:
    """`send` that knows since when it has been waiting for the client. A timeout around every token would cost more."""

    def __init__(self, send: Send):
        self._send = send
        self._since_s: float | None = None

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        self._since_s = monotonic()
        await self._send(message)
        self._since_s = None

    def stalled_s(self) -> float:
        """Seconds that the send in progress has waited; 0 when there is none."""
        return 0.0 if self._since_s is None else monotonic() - self._since_s


class _Sink(Protocol):
    """Where pieces go."""

    has_begun: bool

    async def put(self, piece: Piece) -> None: ...

    async def end(self, usage: Usage) -> None: ...

    async def fail(self, reply: ErrorReply) -> None: ...


class _Plain:
    """Collects the choices and sends one body."""

    def __init__(self, job: Job, shape: Shape, send: Send):
        self.has_begun = False
        self._shape = shape
        self._send = send
        self._wholes = [Whole() for _ in range(job.n * len(job.prompts))]

    async def put(self, piece: Piece) -> None:
        whole = self._wholes[piece.index]
        whole.texts.append(piece.text)
        whole.tokens.extend(piece.tokens)
        whole.finish = piece.finish

    async def end(self, usage: Usage) -> None:
        body = self._shape.body(self._wholes, usage)
        headers = [*_JSON_HEADERS, (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def fail(self, reply: ErrorReply) -> None:
        await reply.send(self._send)


class _Stream:
    """Sends each piece as an event; the response begins with the first one."""

    def __init__(self, job: Job, shape: Shape, send: Send):
        self.has_begun = False
        self._include_usage = job.include_usage
        self._shape = shape
        self._send = send
        self._opened: set[int] = set()

    async def put(self, piece: Piece) -> None:
        chunk = self._shape.chunk(piece)
        if piece.index not in self._opened:
            self._opened.add(piece.index)
            chunk = self._shape.opening(piece.index) + chunk
        if not self.has_begun:
            self.has_begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end(self, usage: Usage) -> None:
        last = self._shape.usage_chunk(usage) + DONE if self._include_usage else DONE
        await self._send({"type": "http.response.body", "body": last})

    async def fail(self, reply: ErrorReply) -> None:
        await self._send({"type": "http.response.body", "body": b"data: " + reply.body + b"\n\n"})
