"""What travels between the hub (conductor's process), the instances and the pool process. Frozen, tagged, msgpack."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from kvasir.core.events import InstanceInfo, InstanceLoad
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import PoolStats
from kvasir.core.request import FinishReason, Sampling


class Message(Struct, frozen=True, tag=True):
    """A message between processes."""


# --- hub → instance ----------------------------------------------------------------------------------------


class Phase(StrEnum):
    """What of a run an instance does."""

    PREFILL = "prefill"  # compute the prompt, then hand off
    DECODE = "decode"  # adopt the run's lease
    BOTH = "both"


class RunRequest(Message, frozen=True):
    """Run a request: `run` names this attempt at it, on every instance that takes part, and its lease in the pool.

    `tokens` (uint32, little-endian) are the prompt and what was sent to the client before (a request that moved). `rank` is its
    prompt's place in the queue.
    """

    run: str
    phase: Phase
    tokens: bytes
    max_total_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    root: BlockKey
    priority: int = 0
    rank: float | None = None


class CancelRun(Message, frozen=True):
    run: str


class Pace(Message, frozen=True):
    """Pause between steps, or do not: others need the cores."""

    pauses: bool


class Shutdown(Message, frozen=True):
    """Finish nothing, release everything, exit."""


# --- instance → hub ----------------------------------------------------------------------------------------


class HelloInstance(Message, frozen=True):
    info: InstanceInfo


class TokenOut(Struct, frozen=True):
    """One token of one run; `top` are (token, logprob) pairs; `cached` comes with a prefill's first token."""

    run: str
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
    """The run's KV is complete and on offer in the pool."""

    run: str
    instance: str


class RunFailed(Message, frozen=True):
    run: str
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


class Progress(Message, frozen=True):
    """How far a process is with starting: `fraction` of `what`."""

    name: str
    fraction: float
    what: str


ToInstance = RunRequest | CancelRun | Pace | Shutdown
FromInstance = HelloInstance | StepOutput | HandedOff | RunFailed | InstanceReport | Progress
FromNode = FromInstance | HelloPool | BlocksChanged | PoolReport
