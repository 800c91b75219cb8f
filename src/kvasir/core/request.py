"""What a client asks for: the request as the brains see it, its sampling parameters and its SLO."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from kvasir.core.keys import BlockKey


class Role(StrEnum):
    """What an instance does."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"
    DRAINING = "draining"  # finishes what it has, and gets nothing new

    @property
    def can_prefill(self) -> bool:
        return self is Role.PREFILL or self is Role.MIXED

    @property
    def can_decode(self) -> bool:
        return self is Role.DECODE or self is Role.MIXED


class FinishReason(StrEnum):
    """Why a request stopped producing tokens."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORTED = "aborted"  # the client went away
    FAILED = "failed"


class Slo(Struct, frozen=True):
    """Latency objectives, in seconds. A request is effective when its TTFT and its TBT both meet them."""

    ttft_s: float = 30.0
    tbt_s: float = 0.1


class Sampling(Struct, frozen=True):
    """How the next token is drawn from the logits.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off. With a `seed`, the draw at position i depends on
    (seed, i) alone, so that a request resumed on another instance continues identically. `logprobs` is the
    number of most likely tokens to report beside the chosen one; None reports nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logprobs: int | None = None


class Request(Struct, frozen=True, gc=False):
    """A request as the brains see it: sizes and keys, no text.

    `keys` are those of the prompt's full blocks. `max_tokens` bounds the output, `arrival_s` is the time at the gateway.
    """

    id: str
    num_prompt_tokens: int
    max_tokens: int
    keys: tuple[BlockKey, ...]
    arrival_s: float
    priority: int = 0
    tenant: str = ""
