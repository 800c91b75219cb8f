"""What the gateway knows of one HTTP exchange, from its arrival to its log line."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Scope

from kvasir.gateway.auth import ANYONE, Caller

_KEY = "kvasir.exchange"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request, as OpenAI's `usage` counts them."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    def to_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Tally:
    """How a generation went; the times are those of its first choice."""

    usage: Usage
    ttft_s: float | None
    tbt_s: float | None


@dataclass(slots=True)
class Exchange:
    """Travels in the ASGI scope: `door` makes it, `answer` fills it, `door` logs it."""

    id: str
    arrival_s: float
    caller: Caller = ANYONE
    status: int | None = None
    code: str | None = None
    tally: Tally | None = None

    def enter(self, scope: Scope) -> None:
        scope[_KEY] = self

    @staticmethod
    def of(request: Request) -> Exchange:
        found = request.scope[_KEY]
        assert isinstance(found, Exchange)
        return found
