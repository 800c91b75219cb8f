"""ShareGPT: conversations as text. Token counts are estimated, arrivals drawn; a turn shares the turns before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec

from kvasir.core.errors import ConfigError, TraceError
from kvasir.workload.readers.table import FreshBlocks
from kvasir.workload.readers.text import by_characters
from kvasir.workload.trace import TRACE_BLOCK_TOKENS, Trace, TraceRequest, in_order

THINK_S = 60.0
"""Mean seconds from an answer's end to the next turn. An assumption: the format has no times at all."""

READ_S = 0.03
"""Seconds that a token of an answer takes to come, so that no turn arrives before the answer that it continues."""

_ANSWERS = ("gpt", "assistant", "chatgpt", "bing", "bard", "model")


@dataclass(frozen=True, slots=True)
class _Turn:
    """One answer: the tokens of everything before it, and its own."""

    input_tokens: int
    output_tokens: int


def read(raw: bytes, *, rate: float, rng: Random, count_tokens: Callable[[str], int] = by_characters) -> Trace:
    """The trace. Conversations start as a Poisson process such that `rate` requests arrive a second in the mean; each
    further turn follows the answer after an exponential think time. Answers without text are dropped and counted.

    Raises TraceError naming conversation and turn, ConfigError for a rate that is not positive.
    """
    if not 0 < rate < float("inf"):
        raise ConfigError(f"not a rate: {rate:g}; expected requests per second above 0")
    conversations, num_dropped = _conversations(raw, count_tokens)
    num_turns = sum(map(len, conversations))
    if not num_turns:
        raise TraceError("trace is empty: got no conversation with an answer")
    starts_per_s = rate * len(conversations) / num_turns
    fresh = FreshBlocks()
    requests: list[TraceRequest] = []
    start_s = 0.0
    for turns in conversations:
        requests += _requests(turns, start_s, fresh, rng)
        start_s += rng.expovariate(starts_per_s)
    requests.sort(key=lambda r: r.arrival_s)
    return in_order(requests, num_dropped=num_dropped, unknown=tuple(_unknown(rate, count_tokens)))


def _unknown(rate: float, count_tokens: Callable[[str], int]) -> Iterator[str]:
    yield f"arrival times: none in this format, drawn at {rate:g} requests/s (Poisson) with {THINK_S:g} s between turns"
    yield "prefix sharing: within a conversation only; whether conversations share a system prompt is not told"
    if count_tokens is by_characters:
        yield "token counts: estimated at 4 characters a token"


def _requests(turns: list[_Turn], start_s: float, fresh: FreshBlocks, rng: Random) -> Iterator[TraceRequest]:
    """Whole blocks are shared by the conversation's later turns; a last partial one grows, so each turn has its own."""
    whole: tuple[int, ...] = ()
    arrival_s = start_s
    for turn in turns:
        num_whole, rest = divmod(turn.input_tokens, TRACE_BLOCK_TOKENS)
        whole += fresh.take(num_whole - len(whole))
        tail = fresh.take(1) if rest else ()
        yield TraceRequest(arrival_s, turn.input_tokens, turn.output_tokens, whole + tail)
        arrival_s += turn.output_tokens * READ_S + rng.expovariate(1 / THINK_S)


def _conversations(raw: bytes, count_tokens: Callable[[str], int]) -> tuple[list[list[_Turn]], int]:
    """The turns of each conversation that has any, and how many answers were empty or answered nothing."""
    conversations: list[list[_Turn]] = []
    num_dropped = 0
    for number, entry in enumerate(_entries(raw), start=1):
        messages = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(messages, list):
            raise TraceError(f"trace conversation {number}: conversations: got {_shown(messages)}, expected a list of turns")
        turns: list[_Turn] = []
        tokens = 0
        for place, message in enumerate(messages, start=1):
            speaker, length = _message(message, number, place, count_tokens)
            if speaker in _ANSWERS:
                is_request = tokens > 0 and length > 0
                num_dropped += not is_request
                turns += [_Turn(tokens, length)] * is_request
            tokens += length
        conversations += [turns] * bool(turns)
    return conversations, num_dropped


def _entries(raw: bytes) -> list[Any]:
    """A JSON list, or one object a line."""
    try:
        if raw.lstrip().startswith(b"["):
            return msgspec.json.decode(raw, type=list[Any])
        return [msgspec.json.decode(line) for line in raw.splitlines() if line.strip()]
    except (msgspec.DecodeError, UnicodeError) as error:
        raise TraceError(f"trace is not ShareGPT JSON: {error}") from None


def _message(message: Any, number: int, place: int, count_tokens: Callable[[str], int]) -> tuple[str, int]:
    fields = message if isinstance(message, dict) else {}
    for name in ("from", "value"):
        if not isinstance(fields.get(name), str):
            raise TraceError(
                f"trace conversation {number}, turn {place}: {name}: got {_shown(fields.get(name))}, expected a text"
            )
    return fields["from"].lower(), count_tokens(fields["value"])


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]
