"""OpenAI's response shapes. What every chunk of a stream shares is encoded once; per token only the delta is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from kvasir.engine.interface import SampledToken
from kvasir.gateway.exchange import Usage
from kvasir.gateway.generation import Piece
from kvasir.gateway.job import Job
from kvasir.gateway.tokenizer import Tokenizer

Json = dict[str, object]
DONE = b"data: [DONE]\n\n"

_UNLIKELY = -9999.0
"""In place of minus infinity, which JSON cannot say; vLLM does the same."""


@dataclass(slots=True)
class Whole:
    """A choice that is complete."""

    texts: list[str] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)
    finish: str | None = None


class Shape(Protocol):
    """One of OpenAI's two response shapes, for one job."""

    def opening(self, index: int) -> bytes:
        """What comes before a choice's first chunk."""
        ...

    def chunk(self, piece: Piece) -> bytes: ...

    def usage_chunk(self, usage: Usage) -> bytes: ...

    def body(self, wholes: Sequence[Whole], usage: Usage) -> bytes: ...


class CompletionShape:
    """/v1/completions."""

    def __init__(self, job: Job, tokenizer: Tokenizer):
        self._job = job
        self._tokenizer = tokenizer
        self._frame = _Frame(job, "text_completion")
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> bytes:
        return b""

    def chunk(self, piece: Piece) -> bytes:
        logprobs = (
            b"null" if self._job.sampling.logprobs is None else msgspec.json.encode(self._logprobs(piece.index, piece.tokens))
        )
        return self._frame.chunk(piece, b',"text":' + _quoted(piece.text), logprobs)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._frame.usage_chunk(usage)

    def body(self, wholes: Sequence[Whole], usage: Usage) -> bytes:
        choices: list[Json] = [
            {
                "index": i,
                "text": "".join(whole.texts),
                "logprobs": self._logprobs(i, whole.tokens),
                "finish_reason": whole.finish,
            }
            for i, whole in enumerate(wholes)
        ]
        return _body(self._job, "text_completion", choices, usage)

    def _logprobs(self, index: int, tokens: list[SampledToken]) -> Json | None:
        if self._job.sampling.logprobs is None:
            return None
        texts = [_text(self._tokenizer, token.token) for token in tokens]
        offsets, at = [], self._offsets.get(index, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        top = [{_text(self._tokenizer, t): _finite(logprob) for t, logprob in _with_own(token)} for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }


class ChatShape:
    """/v1/chat/completions."""

    def __init__(self, job: Job, tokenizer: Tokenizer):
        self._job = job
        self._tokenizer = tokenizer
        self._frame = _Frame(job, "chat.completion.chunk")

    def opening(self, index: int) -> bytes:
        return self._frame.chunk(Piece(index, "", [], None), b',"delta":{"role":"assistant","content":""}', b"null")

    def chunk(self, piece: Piece) -> bytes:
        logprobs = b"null" if self._job.sampling.logprobs is None else msgspec.json.encode(self._logprobs(piece.tokens))
        return self._frame.chunk(piece, b',"delta":{"content":' + _quoted(piece.text) + b"}", logprobs)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._frame.usage_chunk(usage)

    def body(self, wholes: Sequence[Whole], usage: Usage) -> bytes:
        choices: list[Json] = [
            {
                "index": i,
                "message": {"role": "assistant", "content": "".join(whole.texts), "refusal": None},
                "logprobs": self._logprobs(whole.tokens),
                "finish_reason": whole.finish,
            }
            for i, whole in enumerate(wholes)
        ]
        return _body(self._job, "chat.completion", choices, usage)

    def _logprobs(self, tokens: list[SampledToken]) -> Json | None:
        if self._job.sampling.logprobs is None:
            return None
        return {"content": [self._entry(token) for token in tokens], "refusal": None}

    def _entry(self, token: SampledToken) -> Json:
        top = [self._candidate(t, logprob) for t, logprob in token.top[: self._job.sampling.logprobs]]
        return self._candidate(token.token, token.logprob) | {"top_logprobs": top}

    def _candidate(self, token: int, logprob: float | None) -> Json:
        raw = self._tokenizer.token_bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}


class _Frame:
    """The bytes around a delta: `data: {…,"choices":[{"index":` delta `}]}`."""

    def __init__(self, job: Job, kind: str):
        head = {"id": job.id, "object": kind, "created": job.created, "model": job.model}
        self._before = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        # with include_usage every chunk has the field, null in all but the last (OpenAI's reference)
        self._after = b'}],"usage":null}\n\n' if job.include_usage else b"}]}\n\n"

    def chunk(self, piece: Piece, delta: bytes, logprobs: bytes) -> bytes:
        finish = b"null" if piece.finish is None else b'"' + piece.finish.encode() + b'"'
        return b'%b{"index":%d%b,"logprobs":%b,"finish_reason":%b%b' % (
            self._before,
            piece.index,
            delta,
            logprobs,
            finish,
            self._after,
        )

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._before + b'],"usage":' + msgspec.json.encode(usage.to_json()) + b"}\n\n"


def _quoted(text: str) -> bytes:
    """ASCII JSON: line-based readers split on U+2028 and U+0085, which JSON may hold raw and SSE does not mean."""
    return json.dumps(text).encode()


def _body(job: Job, kind: str, choices: list[Json], usage: Usage) -> bytes:
    head = {"id": job.id, "object": kind, "created": job.created, "model": job.model}
    return msgspec.json.encode(head | {"choices": choices, "usage": usage.to_json()})


def _text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; `bytes:\\xe2\\x82` where it is part of a character, as OpenAI writes it."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _with_own(token: SampledToken) -> list[tuple[int, float | None]]:
    """The most likely tokens, and the drawn one where it is not among them."""
    top: list[tuple[int, float | None]] = list(token.top)
    return top if any(t == token.token for t, _ in top) else [*top, (token.token, token.logprob)]


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _UNLIKELY)
