"""What travels between the hub (conductor's process), the instances and the pool process. Frozen, tagged, msgpack."""

from __future__ import annotations

from msgspec import Struct

from kvasir.core.events import InstanceInfo, InstanceLoad
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import PoolStats
from kvasir.core.request import FinishReason, Sampling


class Message(Struct, frozen=True, tag=True):
    """A message between processes."""


# --- hub → instance ----------------------------------------------------------------------------------------


class RunRequest(Message, frozen=True):
    """Run a request. `tokens` are uint32 little-endian.

    The first `num_prompt_tokens` are the prompt, the rest was already sent to the client (a request that moved).
    `phase` is `prefill` (then hand off), `decode` (adopt its lease) or `both`.
    """

    request_id: str
    attempt: int
    phase: str
    tokens: bytes
    num_prompt_tokens: int
    max_total_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    root: BlockKey
    priority: int = 0


class CancelRequest(Message, frozen=True):
    request_id: str
    attempt: int


class Shutdown(Message, frozen=True):
    """Finish nothing, release everything, exit."""


# --- instance → hub ----------------------------------------------------------------------------------------


class HelloInstance(Message, frozen=True):
    info: InstanceInfo


class TokenOut(Struct, frozen=True):
    """One token of one request; `top` are (token, logprob) pairs; `cached` comes with a prefill's first token."""

    request_id: str
    attempt: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    cached: int | None = None
    finish: FinishReason | None = None


class StepOutput(Message, frozen=True):
    """All tokens that one step produced."""

    instance: str
    tokens: tuple[TokenOut, ...]


class HandedOff(Message, frozen=True):
    """The request's KV is complete and on offer in the pool."""

    request_id: str
    attempt: int
    instance: str


class RequestError(Message, frozen=True):
    request_id: str
    attempt: int
    instance: str
    error: str


class InstanceReport(Message, frozen=True):
    """Heartbeat."""

    instance: str
    epoch: int
    load: InstanceLoad


# --- pool → hub --------------------------------------------------------------------------------------------


class HelloPool(Message, frozen=True):
    node: str
    num_slots: int


class BlocksChanged(Message, frozen=True):
    node: str
    seq: int
    stored: tuple[BlockKey, ...]
    removed: tuple[BlockKey, ...]


class PoolReport(Message, frozen=True):
    node: str
    stats: PoolStats
