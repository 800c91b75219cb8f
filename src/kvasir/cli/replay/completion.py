"""One streamed completion of an OpenAI-compatible API: the body to send, and the meaning of what comes back."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

_DONE = b"[DONE]"
_NO_TEXT = 1e-6  # characters that an event without text counts for: it gets surplus tokens last
_WORDS = """
    time year people way day man thing woman life child world school state family student group country problem hand part
    place case week company system program question work number night point home water room mother area money story fact
    month lot right study book eye job word business side kind head house service friend father power hour game line end
    member law car city name team
""".split()  # noqa: SIM905 - words read best as text
"""Common words, one token each in common vocabularies: chat prompts cannot be token ids."""


class Endpoint(StrEnum):
    """Which API is loaded."""

    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self is Endpoint.CHAT else "/v1/completions"

    def vocabulary(self, token_ids: range) -> range:
        """What prompts are drawn from: token ids, or for chat the words of a list."""
        return range(len(_WORDS)) if self is Endpoint.CHAT else token_ids


def request_body(endpoint: Endpoint, model: str, prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool) -> bytes:
    """The JSON of a greedy, streamed request that reports usage. `ignore_eos` is an extension of vLLM's and Kvasir's."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if endpoint is Endpoint.CHAT:
        body["messages"] = [{"role": "user", "content": " ".join(_WORDS[i] for i in prompt)}]
    else:
        body["prompt"] = prompt
    if ignore_eos:
        body["ignore_eos"] = True
    return msgspec.json.encode(body)


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: dict[str, Any] = {}
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class StreamReading:
    """What the events of one stream have said so far."""

    arrivals: list[tuple[float, int]] = field(default_factory=list)  # time and characters of each event with output
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    error: str | None = None
    is_complete: bool = False

    def read(self, payload: bytes, now: float) -> None:
        """Take in one event's payload; an unreadable one is an error of the server's."""
        if payload == _DONE:
            self.is_complete = True
            return
        try:
            event = _decode(payload)
        except (msgspec.DecodeError, UnicodeError):
            self.error = self.error or "bad_event"
            return
        if event.error is not None:
            self.error = self.error or error_code(event.error, "stream_error")
        if event.usage is not None:
            self._read_usage(event.usage)
        for choice in event.choices:
            self._read_choice(choice, now)

    def token_times_s(self) -> tuple[float, ...]:
        """One time per output token by the server's count; tokens of one event share its time.

        Where events carry several tokens, the surplus goes to the events with the most characters a token.
        """
        counts = [1] * len(self.arrivals)
        if not counts:
            return ()
        if self.num_output_tokens is not None and self.num_output_tokens < len(counts):
            del counts[max(1, self.num_output_tokens) :]  # trailing events without a token of their own
        surplus = (self.num_output_tokens or 0) - len(counts)
        if surplus > 0:
            _spread(counts, [characters for _, characters in self.arrivals], surplus)
        return tuple(now for (now, _), count in zip(self.arrivals, counts, strict=False) for _ in range(count))

    def _read_choice(self, choice: _Choice, now: float) -> None:
        self.is_complete = self.is_complete or choice.finish_reason is not None
        text = choice.text
        if text is None:
            text = choice.delta.get("content") or choice.delta.get("reasoning_content") or None
        # A completion event with empty text is a token that is not yet a character; a chat's is its role.
        if text or (text is not None and choice.finish_reason is None):
            self.arrivals.append((now, len(text)))

    def _read_usage(self, usage: _Usage) -> None:
        self.num_prompt_tokens = usage.prompt_tokens
        self.num_output_tokens = usage.completion_tokens
        if usage.prompt_tokens_details is not None:
            self.num_cached_tokens = usage.prompt_tokens_details.cached_tokens


def error_code(error: Any, default: str) -> str:
    """The machine-readable word of an OpenAI error object: its code, else its type, else `default`."""
    if isinstance(error, dict):
        for key in ("code", "type"):
            if isinstance(error.get(key), str) and error[key]:
                return str(error[key])
    return default


def error_code_of_body(body: bytes, default: str) -> str:
    """`error_code` of an error response; bodies that are not JSON objects get `default`."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError):
        return default
    if not isinstance(answer, dict):
        return default
    # OpenAI nests the object under "error"; some servers send it bare.
    return error_code(answer.get("error", answer), default)


def _spread(counts: list[int], characters: list[int], surplus: int) -> None:
    """Add `surplus` tokens one by one, each to the event that has the most characters a token by then."""
    heap = [(-(max(length, _NO_TEXT) / counts[i]), i) for i, length in enumerate(characters)]
    heapq.heapify(heap)
    for _ in range(surplus):
        _, i = heap[0]
        counts[i] += 1
        heapq.heapreplace(heap, (-(max(characters[i], _NO_TEXT) / counts[i]), i))
