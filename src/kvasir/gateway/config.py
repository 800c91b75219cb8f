"""What can be set about the gateway."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvasir.core.errors import ConfigError
from kvasir.core.request import Slo


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Settings of the HTTP front door. Raises ConfigError when a value cannot work."""

    served_model_name: str | None = None
    """The name that clients give in `model`; the checkpoint's own name when unset."""
    api_keys: tuple[str, ...] = ()
    """Accepted `Authorization: Bearer` keys; each is a tenant of its own. None configured: the API is open."""
    admin_keys: tuple[str, ...] = ()
    """Keys that open /admin. None configured: it is open to this machine alone, and closed when there are API keys."""
    slo: Slo = field(default_factory=Slo)
    """By which answers count as effective."""
    max_body_bytes: int = 4 * 2**20
    """Longest request body; half a million tokens of text fit."""
    max_choices: int = 128
    """Most choices of one request, over all its prompts."""
    max_logprobs: int = 20
    """Most alternatives that `logprobs` and `top_logprobs` may ask for; OpenAI's bound."""
    tokenizer_threads: int = 2
    """Long prompts that are tokenized at the same time."""
    max_tokenizing: int = 256
    """Long prompts that may wait for a tokenizer thread; beyond it the answer is 429."""
    send_timeout_s: float = 60.0
    """A client that takes nothing off its socket for this long has its request aborted."""
    stop_timeout_s: float = 10.0
    """How long running answers may go on after the server was told to stop."""

    def __post_init__(self) -> None:
        if any(not key or not key.isascii() or key != key.strip() for key in self.api_keys + self.admin_keys):
            raise ConfigError("an API key or admin key is empty, has spaces around it or is not ASCII; give printable keys")
        if set(self.api_keys) & set(self.admin_keys):
            raise ConfigError("an admin key is an API key too; clients would be operators, so give another")
        if min(self.max_body_bytes, self.max_choices, self.tokenizer_threads, self.max_tokenizing) < 1:
            raise ConfigError("max_body_bytes, max_choices, tokenizer_threads and max_tokenizing must be at least 1")
        if not (self.send_timeout_s > 0 and self.stop_timeout_s >= 0):
            raise ConfigError("send_timeout_s must be greater than 0 and stop_timeout_s at least 0 seconds")
