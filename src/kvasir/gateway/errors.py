"""Errors as OpenAI clients expect them: an HTTP status, an error object, sometimes Retry-After."""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus
from math import ceil

import msgspec
from starlette.types import Send

from kvasir.cluster.service import Rejected, RequestFailed
from kvasir.core.commands import Reject
from kvasir.core.errors import ClusterError, DeadlineExceeded, RequestError

Json = dict[str, object]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    500: "server_error",
}


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """What is sent: as a response, or as the last event of a stream that has begun."""

    status: int
    error: Json
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def code(self) -> str:
        return str(self.error["code"])

    @property
    def body(self) -> bytes:
        return msgspec.json.encode({"error": self.error})

    async def send(self, send: Send) -> None:
        """As a whole HTTP response."""
        headers = {"content-type": "application/json", "content-length": str(len(self.body)), **self.headers}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": raw})
        await send({"type": "http.response.body", "body": self.body})


def reply_to(error: Exception) -> ErrorReply:
    """How `error` is told to a client. An error of ours that is not meant for clients says no more than that."""
    match error:
        case RequestError():
            headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(error.status, {})
            return ErrorReply(error.status, _error(str(error), error.status, code=error.code, param=error.param), headers)
        case Rejected():
            return _rejection(error.reject)
        case RequestFailed():
            return ErrorReply(503, _error(error.fail.message, 503, code=error.fail.code), {"retry-after": "1"})
        case ClusterError():
            code = "deadline_exceeded" if isinstance(error, DeadlineExceeded) else "cluster_error"
            return ErrorReply(503, _error(str(error), 503, code=code), {"retry-after": "1"})
        case _:
            return ErrorReply(500, _error("internal error; the server's log has the cause", 500, code="internal_error"))


def reply_to_status(status: int, *, method: str, path: str, headers: dict[str, str]) -> ErrorReply:
    """For what the router refuses: an unknown path (404) or a method that the path does not take (405)."""
    messages = {404: f"no such path: {path}", 405: f"{path} does not take {method}"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "http_error")
    return ErrorReply(status, _error(messages.get(status, HTTPStatus(status).phrase), status, code=code), headers)


def _rejection(reject: Reject) -> ErrorReply:
    if reject.code == "too_large":
        return ErrorReply(400, _error(reject.message, 400, code=reject.code, param="max_tokens"))
    decision = reject.decision
    why = {"policy": decision.policy, "reason": decision.reason, "ttft_s": decision.ttft_s, "tbt_s": decision.tbt_s}
    error = _error(reject.message, 429, code=reject.code) | {"retry_after_s": reject.retry_after_s, "decision": why}
    return ErrorReply(429, error, {"retry-after": str(max(1, ceil(reject.retry_after_s)))})


def _error(message: str, status: int, *, code: str, param: str | None = None) -> Json:
    return {"message": message, "type": _TYPES.get(status, "invalid_request_error"), "param": param, "code": code}
