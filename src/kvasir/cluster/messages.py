"""What travels between the hub (conductor's process), the instances and the pool process. Frozen, tagged, msgpack."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from kvasir.core.events import InstanceInfo, InstanceLoad
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import PoolStats
from kvasir.core.request import FinishReason, Sampling
from kvasir.core.usage import TenantUsage, TransportUsage
from kvasir.engine.interface import ModelSpec
from kvasir.store.messenger.transport import PeerArena


class Message(Struct, frozen=True, tag=True):
    """A message between processes."""


# --- hub → instance ----------------------------------------------------------------------------------------


class Phase(StrEnum):
    """What of a run an instance does."""

    PREFILL = "prefill"  # compute the prompt, then hand off
    DECODE = "decode"  # adopt the run's lease
    BOTH = "both"


class PrefixPlan(Struct, frozen=True):
    """Which blocks of a prompt are to be in place before it is computed: the first `blocks`.

    What the node's DRAM lacks of them is read from its SSD, then fetched from one of the nodes `sources`. After `within_s` the
    rest is computed instead, whatever has come by then. Computing may start `hidden_s` before the last layer has come.
    """

    blocks: int
    sources: tuple[str, ...]
    within_s: float
    hidden_s: float = 0.0


class StagePlan(Struct, frozen=True):
    """A run's part in a chunked pipeline: stage `number` of `num_stages`, each on an instance of its own, all on one node.

    All stages write their layers' KV into the same `pages`, which are for the whole prompt and hold its first `cached` tokens.
    The residual stream goes through slots of the pool, too: stage i writes `mail[i]` and stage i + 1 reads it, a row for each
    token that is not cached. The last stage is told first, without these, and says PipelineReady with them.
    """

    number: int
    num_stages: int
    cached: int = 0
    pages: tuple[int, ...] = ()
    mail: tuple[tuple[int, ...], ...] = ()

    @property
    def is_last(self) -> bool:
        return self.number == self.num_stages - 1


class RunRequest(Message, frozen=True):
    """Run a request: `run` names this attempt at it, on every instance that takes part, and its lease in the pool.

    `tokens` (uint32, little-endian) are the prompt and what was sent to the client before (a request that moved). `rank` is its
    prompt's place in the queue. `prefix` says what to bring before a prefill; a hand-off waits in the pool of node `source`
    (None: this instance's own). With a `stage` the prompt is computed by a pipeline.
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
    prefix: PrefixPlan | None = None
    source: str | None = None
    tenant: str = ""
    stage: StagePlan | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // 4


class ExtendRun(Message, frozen=True):
    """The stage before has computed the first `available` tokens of the run's prompt."""

    run: str
    available: int


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


class PipelineReady(Message, frozen=True):
    """The last stage of a pipeline has brought the prefix, and put pages for the prompt and slots for the mail on offer."""

    run: str
    instance: str
    plan: StagePlan


class StageComputed(Message, frozen=True):
    """A stage has computed the first `available` tokens of a prompt; with all of them it has done its part."""

    run: str
    instance: str
    available: int


class StageLeft(Message, frozen=True):
    """A stage has left its pipeline before the end, and writes nothing for it any more."""

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


class PeerPool(Struct, frozen=True):
    """A node's pool as other nodes' pools reach it: `control` for leases, `arena` for bytes. `epoch` is its incarnation, `rack`
    where its machine stands and `link_bytes_s` what its network carries, as declared (0: not).
    """

    node: str
    epoch: int
    control: str
    arena: PeerArena
    rack: str = ""
    link_bytes_s: float = 0.0


class HelloPool(Message, frozen=True):
    """`peer` is None for a pool that other nodes cannot reach."""

    node: str
    num_slots: int
    peer: PeerPool | None = None


class BlocksChanged(Message, frozen=True):
    """The last word on each block that came or went, in DRAM and on the SSD; `seq` counts these messages from 1."""

    node: str
    seq: int
    stored: tuple[BlockKey, ...]
    removed: tuple[BlockKey, ...]
    ssd_stored: tuple[BlockKey, ...] = ()
    ssd_removed: tuple[BlockKey, ...] = ()


class PoolReport(Message, frozen=True):
    node: str
    stats: PoolStats
    transports: tuple[TransportUsage, ...] = ()
    tenants: tuple[TenantUsage, ...] = ()


class OrderDone(Message, frozen=True):
    """A pool did what the operator's order `id` said, to `blocks` blocks; or it could not, and says why in one line."""

    node: str
    id: int
    blocks: int = 0
    error: str | None = None


class Progress(Message, frozen=True):
    """How far a process is with starting: `fraction` of `what`."""

    name: str
    fraction: float
    what: str


# --- nodes that join -----------------------------------------------------------------------------------------


class HelloNode(Message, frozen=True):
    """A node asks to join: what of its model must agree, and which instances it will start."""

    model: ModelSpec
    num_instances: int


class Welcome(Message, frozen=True):
    """The node is in, under this name, as this incarnation. `max_model_len` is the cluster's; its pool must hold that."""

    node: str
    epoch: int
    max_model_len: int
    lease_s: float


class NotWelcome(Message, frozen=True):
    reason: str


class NodeAlive(Message, frozen=True):
    """Renews the node's lease; answered by HubAlive."""

    node: str
    epoch: int


class HubAlive(Message, frozen=True):
    """`known`: the node is a member. One that is not any more must stop and join anew."""

    known: bool


class InstanceGone(Message, frozen=True):
    """An instance's process has ended, and will be started again or not."""

    node: str
    instance: str


class LeaveNode(Message, frozen=True):
    """The node wants to stop: give it no more work, and say Goodbye when it holds none."""

    node: str


class Goodbye(Message, frozen=True):
    """Stop: the node has left, or the cluster ends."""


class EndInstance(Message, frozen=True):
    """Kill this instance's process: it is silent."""

    instance: str


FromJoiner = HelloNode | NodeAlive | InstanceGone | LeaveNode
ToJoiner = Welcome | NotWelcome | HubAlive | EndInstance | Goodbye

ToInstance = RunRequest | ExtendRun | CancelRun | Pace | Shutdown
FromStage = PipelineReady | StageComputed | StageLeft
FromInstance = HelloInstance | StepOutput | HandedOff | RunFailed | InstanceReport | FromStage | Progress
FromNode = FromInstance | HelloPool | BlocksChanged | PoolReport | OrderDone | FromJoiner
