"""What a replay must know of the server's model: its name, context and vocabulary."""

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec

from kvasir.cli.replay.http import Disconnected, ProtocolError, Server, exchange
from kvasir.core.errors import ClusterError, ConfigError

_PROBE_TIMEOUT_S = 10.0
_UNKNOWN_VOCABULARY = range(1000, 20_000)
"""Safe where the server does not tell: ids below are bytes and special tokens, vocabularies in use have 32,000 and more."""

_LOWEST_ID = 1000
_TOP_PER_CENT = 95  # added special tokens sit at the top: the last 0.2 % of Llama 3 and of Qwen 2


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The model as `/v1/models` describes it; None for what the server does not tell (vLLM tells no vocabulary)."""

    name: str
    max_model_len: int | None = None
    vocab_size: int | None = None


async def probe(server: Server, name: str | None) -> ModelCard:
    """Ask the server; `name` picks among several models. Raises ClusterError or ConfigError in one line."""
    cards = _cards(await _get_models(server, needs_answer=name is None))
    if name is None:
        if len(cards) != 1:
            raise ConfigError(f"server offers {len(cards)} models ({', '.join(c.name for c in cards)}); pick one with --model")
        return cards[0]
    for card in cards:
        if card.name == name:
            return card
    if cards:
        raise ConfigError(f"server has no model {name!r}; it has {', '.join(c.name for c in cards)}")
    return ModelCard(name)


def usable_token_ids(vocab_size: int | None) -> range:
    """Ids that are ordinary tokens in any usual vocabulary of that size: neither bytes nor special tokens."""
    if vocab_size is None:
        return _UNKNOWN_VOCABULARY
    if vocab_size < 8:
        raise ConfigError(f"not a vocabulary: {vocab_size} tokens; expected at least 8")
    return range(min(_LOWEST_ID, vocab_size // 4), vocab_size * _TOP_PER_CENT // 100)


async def _get_models(server: Server, *, needs_answer: bool) -> Any:
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S), exchange(server, "GET", "/v1/models") as answer:
            body = b"".join([piece async for piece in answer.body()])
            status = answer.status
    except (OSError, TimeoutError, ProtocolError, Disconnected) as error:
        why = str(error) or type(error).__name__
        raise ClusterError(
            f"no answer from {server.origin}/v1/models: {why}; is the server running? try: kvasir serve"
        ) from None
    if status == 200:
        try:
            return msgspec.json.decode(body)
        except msgspec.DecodeError:
            raise ClusterError(f"{server.origin}/v1/models: got something that is not JSON; is this an OpenAI API?") from None
    if status in (401, 403):
        raise ClusterError(f"{server.origin}/v1/models: HTTP {status}; give a valid key with --api-key")
    if needs_answer:
        raise ClusterError(f"{server.origin}/v1/models: HTTP {status}; name the model with --model")
    return {}


def _cards(answer: Any) -> list[ModelCard]:
    entries = answer.get("data") if isinstance(answer, dict) else None
    return [
        ModelCard(entry["id"], _count(entry, "max_model_len"), _count(entry, "vocab_size"))
        for entry in entries or []
        if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    ]


def _count(entry: dict[str, Any], key: str) -> int | None:
    value = entry.get(key)
    return value if isinstance(value, int) and value > 0 else None
