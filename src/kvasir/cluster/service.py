"""What the gateway needs of a cluster, and nothing more."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from kvasir.cluster.orders import PinPriority
from kvasir.core.commands import Decision, Fail, Reject
from kvasir.core.errors import ClusterError
from kvasir.core.events import InstanceInfo, InstanceLoad
from kvasir.core.pool_events import PoolStats
from kvasir.core.request import FinishReason, Sampling
from kvasir.core.usage import TenantUsage, TransportUsage
from kvasir.engine.interface import ModelSpec, SampledToken


@dataclass(frozen=True, slots=True)
class Submission:
    """One prompt to be answered. `salt` keeps its KV apart from other tenants'; `stop_tokens` end the output too."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    ignore_eos: bool = False
    stop_tokens: tuple[int, ...] = ()
    salt: str = ""
    tenant: str = ""
    priority: int = 0


@dataclass(slots=True)
class Output:
    """New tokens of a request, in order. `cached_tokens` comes with the first; `finish_reason` with the last."""

    tokens: list[SampledToken]
    cached_tokens: int | None = None
    finish_reason: FinishReason | None = None


class Rejected(ClusterError):
    """The conductor rejected the request before any work was spent on it: HTTP 429."""

    def __init__(self, reject: Reject):
        super().__init__(reject.message)
        self.reject = reject


class RequestFailed(ClusterError):
    """No instance could answer the request: HTTP 503, or an error event in a running stream."""

    def __init__(self, fail: Fail):
        super().__init__(fail.message)
        self.fail = fail


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    info: InstanceInfo
    load: InstanceLoad
    heartbeat_age_s: float
    output_tokens: int = 0
    """Tokens drawn since the start."""
    prompt_tokens: int = 0
    """Prompt tokens computed since the start."""


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """A snapshot for /ready, /metrics and whoever watches."""

    ready: bool
    reason: str
    instances: tuple[InstanceStatus, ...]
    pools: dict[str, PoolStats]
    counters: dict[str, float] = field(default_factory=dict)
    transports: dict[str, tuple[TransportUsage, ...]] = field(default_factory=dict)
    tenants: dict[str, tuple[TenantUsage, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TimedDecision:
    """A decision of the conductor, `age_s` ago."""

    decision: Decision
    age_s: float


@dataclass(frozen=True, slots=True)
class PinStatus:
    """A prefix that is kept from eviction for another `ttl_s`: the `num_blocks` full blocks of a prompt of `num_tokens`.

    `held` is how many of them each node had when they were pinned.
    """

    id: str
    num_tokens: int
    num_blocks: int
    ttl_s: float
    priority: PinPriority
    tenant: str
    held: dict[str, int]


class Admin(Protocol):
    """A cluster as its operator sees it. What orders pools about raises ClusterError when one cannot, or does not answer."""

    def decisions(self, limit: int) -> list[TimedDecision]:
        """The latest decisions, the newest first."""
        ...

    async def clear_cache(self) -> dict[str, int]:
        """Forget every block that no request holds; how many each node forgot."""
        ...

    def pins(self) -> list[PinStatus]: ...

    async def pin(self, prompt: list[int], *, salt: str, tenant: str, ttl_s: float, priority: PinPriority) -> PinStatus:
        """Keep the prompt's blocks, on every node that has them. Raises RequestError."""
        ...

    async def unpin(self, pin_id: str) -> PinStatus:
        """Raises RequestError 404."""
        ...

    async def set_quota(self, tenant: str, blocks: int | None) -> dict[str, int]:
        """How many blocks the tenant may have in each node's DRAM; None lifts the quota. The nodes that were told."""
        ...


class Service(Protocol):
    """A cluster as the gateway sees it."""

    @property
    def spec(self) -> ModelSpec: ...

    def submit(self, submission: Submission) -> AsyncGenerator[Output, None]:
        """Tokens as they come. Raises Rejected before the first or RequestFailed at any time.

        An async generator: closing it (`aclose`, or cancelling its reader) aborts the request and releases all that it holds.
        """
        ...

    def status(self) -> ClusterStatus: ...
