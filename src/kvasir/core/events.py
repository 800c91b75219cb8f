"""What happens: the events that brains take. Frozen and tagged, so one declaration serves brain, log, replay and wire."""

from __future__ import annotations

from msgspec import Struct

from kvasir.core.keys import BlockKey
from kvasir.core.request import FinishReason, Request, Role
from kvasir.core.tier import Tier


class Event(Struct, frozen=True, tag=True, gc=False):
    """Something that happened; the time is given beside it.

    `gc=False`, here and in other messages: of plain values, they are in no cycle, and the collector need not look at them.
    """


# --- Conductor ---------------------------------------------------------------------------------------------


class InstanceInfo(Struct, frozen=True, gc=False):
    """An instance as it introduces itself. `kv_tokens` is how many tokens of KV its node can hold."""

    id: str
    role: Role
    node: str
    epoch: int
    kv_tokens: int
    max_batch: int


class InstanceLoad(Struct, frozen=True, gc=False):
    """An instance's own account of its queues, sent with each heartbeat.

    `prefill_scale` and `decode_scale` are how many times as long as the cost model says its steps take; None: not measured yet.
    """

    waiting: int = 0
    running: int = 0
    waiting_tokens: int = 0
    context_tokens: int = 0
    free_kv_tokens: int = 0
    prefill_scale: float | None = None
    decode_scale: float | None = None


class Arrived(Event, frozen=True):
    request: Request


class PrefillDone(Event, frozen=True):
    """The prompt's KV is complete and the first token is with the client. `cached_tokens` came from the pool."""

    request_id: str
    instance: str
    cached_tokens: int


class Finished(Event, frozen=True):
    request_id: str
    instance: str
    reason: FinishReason
    output_tokens: int


class Aborted(Event, frozen=True):
    """The client went away."""

    request_id: str


class Failed(Event, frozen=True):
    """An instance could not carry out what it was told; the request may go elsewhere."""

    request_id: str
    instance: str
    error: str


class InstanceJoined(Event, frozen=True):
    info: InstanceInfo


class InstanceLost(Event, frozen=True):
    instance: str
    epoch: int


class BlocksStored(Event, frozen=True):
    """Blocks became readable in a tier of a node. `seq` counts a node's block events, removals too, so that a gap can be seen.

    A pool process counts from 1 (or 0); a count that starts again is a pool that started again.
    """

    node: str
    seq: int
    keys: tuple[BlockKey, ...]
    tier: Tier = Tier.DRAM


class BlocksRemoved(Event, frozen=True):
    node: str
    seq: int
    keys: tuple[BlockKey, ...]
    tier: Tier = Tier.DRAM


class Inventory(Event, frozen=True):
    """All blocks that are readable on a node, as of its block event `seq`: the answer to Resync.

    `keys` are those in DRAM, `ssd_keys` those on the SSD; a block may be in both.
    """

    node: str
    seq: int
    keys: tuple[BlockKey, ...]
    ssd_keys: tuple[BlockKey, ...] = ()


class NodeLost(Event, frozen=True):
    """A node's pool process is gone and with it all blocks of the node."""

    node: str


class Heartbeat(Event, frozen=True):
    instance: str
    epoch: int
    load: InstanceLoad


class Tick(Event, frozen=True):
    """Time passed; sent at least once a second, to the Conductor and to each Batcher that has work but no step in flight."""


# --- Batcher -----------------------------------------------------------------------------------------------


class Submitted(Event, frozen=True):
    """A sequence is ready to run on this instance: `pages`, all of its lease, hold its first `num_computed` tokens.

    `num_tokens` counts the tokens known so far (the prompt, and for a handed-off sequence its first token); at least one is not
    yet computed. `max_total_tokens` is where it must end; `hand_off` says that it leaves after its prefill. A last page that is
    partly filled is the lease's own (adopted with a hand-off) and will be written; full pages never are. A higher
    `priority` goes first, and within a priority the least `rank`, which the Conductor gave (None: now, in order of submission).

    A stage of a chunked pipeline computes a `share` below 1 of the model's layers: only the first `available` tokens may be
    computed until Extended says that more have come through the stage before. Every stage but the last `is_stage`: it
    leaves with Release when its prompt is computed, publishes nothing and draws no token. Stages that share their pages are
    given all that the prompt will fill, as pages of its lease.
    """

    request_id: str
    num_tokens: int
    num_computed: int
    max_total_tokens: int
    pages: tuple[int, ...]
    hand_off: bool = False
    priority: int = 0
    rank: float | None = None
    share: float = 1.0
    available: int | None = None
    is_stage: bool = False


class Extended(Event, frozen=True):
    """The stage before has computed the first `available` tokens of a sequence, which may be computed here now."""

    request_id: str
    available: int


class StepDone(Event, frozen=True):
    """The last Step was carried out. `finished` are the sequences whose newest token ended them.

    A sequence that reached its `max_total_tokens` is over whether it is listed or not. Of a Step that repeats, `steps` passes
    were made; whoever carries it out may stop early. `seconds` is what a pass took, with what comes between
    steps, where that was measured and nothing else was waited for.
    """

    finished: tuple[str, ...] = ()
    steps: int = 1
    seconds: float | None = None


class Cancelled(Event, frozen=True):
    request_id: str


class PagesGranted(Event, frozen=True):
    """The pool's answer to NeedPages; may hold fewer pages than asked, or none."""

    pages: tuple[int, ...]
