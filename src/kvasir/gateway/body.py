"""Request bodies: bounded, decoded, validated; every fault is a RequestError that names field and reason."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request

from kvasir.core.errors import RequestError
from kvasir.gateway.errors import ClientGone
from kvasir.gateway.fields import MAX_PROMPTS, Fields, refuse_unsupported

F = TypeVar("F", bound=Fields)

_READ_TIMEOUT_S = 60.0
"""A body that does not arrive in this time is given up; nginx's client_body_timeout."""


async def read_fields(request: Request, kind: type[F], *, max_bytes: int) -> F:
    """The body as `kind`. Raises RequestError: 400, 408, 413 or 415."""
    raw = await _read(request, max_bytes)
    try:
        fields = kind.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_input=False, include_context=False)) from None
    refuse_unsupported(fields)
    return fields


async def _read(request: Request, max_bytes: int) -> bytes:
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        message = f"Content-Encoding {encoding[:50]} is not supported; send the body uncompressed"
        raise RequestError(message, status=415, code="unsupported_encoding")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(_READ_TIMEOUT_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                chunks.append(chunk)
    except ClientDisconnect:
        raise ClientGone from None
    except TimeoutError:
        message = f"the request body did not arrive within {_READ_TIMEOUT_S:.0f} s"
        raise RequestError(message, status=408, code="request_timeout") from None
    return b"".join(chunks)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"the request body is longer than {max_bytes} bytes", status=413, code="request_too_large")


def _refusal(errors: list[ErrorDetails]) -> RequestError:
    """The first fault in words, without the value: it may be a prompt."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json")
    if not first["loc"]:
        return RequestError("the body must be a JSON object", code="invalid_json")
    param = str(first["loc"][0])
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return RequestError(f"{param} is required", code="missing_required_parameter", param=param)
    if param == "prompt":
        if any(error["type"] == "too_long" for error in errors if error["loc"][0] == param):
            return RequestError(f"prompt: at most {MAX_PROMPTS} prompts", param=param)
        expected = "a string, a list of strings, a list of token ids, or a list of lists of token ids"
        return RequestError(f"prompt must be {expected}", param=param)
    if first["type"] == "too_short" and first["loc"] == ("messages",):
        return RequestError("messages is empty; give at least one message", param=param)
    where = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    return RequestError(f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}", param=param)


def _is_branch(part: int | str) -> bool:
    """True for what pydantic adds to a path to name the branch of a union, such as `list[constrained-str]`."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "constrained-str"))
