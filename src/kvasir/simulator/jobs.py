"""A request on its way through a simulation: the job, its attempts, and its sequences on instances."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvasir.core.keys import BlockKey
from kvasir.simulator.gaps import Gaps
from kvasir.simulator.network import Flow

if TYPE_CHECKING:
    from kvasir.simulator.instance import SimInstance
    from kvasir.simulator.node import SimNode


class Job:
    """One request of the trace between its arrival and its outcome.

    `emitted` tokens are with the client, the last since `last_token_s`; `gaps` are those of sequences that have ended.
    """

    __slots__ = (
        "arrival_s",
        "attempt",
        "cached_tokens",
        "emitted",
        "first_token_s",
        "gaps",
        "id",
        "keys",
        "last_token_s",
        "number",
        "output_tokens",
        "prompt_tokens",
    )

    def __init__(
        self, number: int, job_id: str, *, arrival_s: float, prompt_tokens: int, output_tokens: int, keys: tuple[BlockKey, ...]
    ):
        self.number = number
        self.id = job_id
        self.arrival_s = arrival_s
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.keys = keys
        self.emitted = 0
        self.cached_tokens: int | None = None
        self.first_token_s = 0.0
        self.last_token_s = 0.0
        self.gaps: list[Gaps] = []
        self.attempt: Attempt | None = None

    @property
    def known_tokens(self) -> int:
        """Prompt and output so far."""
        return self.prompt_tokens + self.emitted

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


class Attempt:
    """One placement of a job. `stages` prefill it, in order, the last of them holds it; `decode` is where it will go.

    `flows` carry KV on its behalf, each with what to do when nobody wants it any more; the `stream` of them takes the
    prompt's KV to node `stream_to`. `offered` is the node where its KV waits for whoever decodes.
    """

    __slots__ = ("decode", "decoder", "flows", "is_prefilled", "job", "name", "offered", "stages", "stream", "stream_to")

    def __init__(self, job: Job, name: str, decode: str):
        self.job = job
        self.name = name
        self.decode = decode
        self.stages: list[Seq] = []
        self.decoder: Seq | None = None
        self.flows: dict[Flow, Callable[[], None] | None] = {}
        self.stream: Flow | None = None
        self.stream_to: SimNode | None = None
        self.offered: SimNode | None = None
        self.is_prefilled = False

    def forget(self) -> None:
        """It is over: let go of what refers back, so that its memory is free at once and not when garbage is collected."""
        self.stages = []
        self.decoder = self.stream = None
        self.flows = {}

    @property
    def sequences(self) -> list[Seq]:
        return self.stages if self.decoder is None else [*self.stages, self.decoder]


class Seq:
    """A job's sequence on one instance.

    `num_tokens` were known and `prefix_tokens` computed when it was submitted; the step that its prompt is in computes up to
    `computed` and, if it `samples`, draws a token. `pages` are those of its lease, in order.
    Puts of prompt blocks wait in `deferred` while a fetch of earlier blocks is under way (None: no fetch is). Its decode
    passes are in its instance's log from entry `log_at` on.
    """

    __slots__ = (
        "attempt",
        "available",
        "computed",
        "deferred",
        "extra_s",
        "hands_off",
        "has_lease",
        "instance",
        "is_adopted",
        "is_cancelled",
        "is_decoding",
        "is_fetched",
        "is_joined",
        "is_started",
        "is_submitted",
        "job",
        "log_at",
        "name",
        "num_tokens",
        "pages",
        "passes_at",
        "prefix_tokens",
        "puts_end",
        "rank",
        "samples",
        "share",
        "stage",
    )

    def __init__(self, attempt: Attempt, instance: SimInstance, name: str, *, rank: float | None = None, share: float = 1.0):
        self.attempt = attempt
        self.job = attempt.job
        self.instance = instance
        self.name = name
        self.rank = rank
        self.share = share
        self.stage: Seq | None = None  # the next stage of a pipeline
        self.available: int | None = None
        self.num_tokens = attempt.job.known_tokens
        self.prefix_tokens = 0
        self.computed = 0
        self.samples = False
        self.pages: list[int] = []
        self.deferred: list[BlockKey] | None = None
        self.puts_end = False
        self.hands_off = False
        self.has_lease = False
        self.is_adopted = False
        self.is_submitted = False
        self.is_started = False
        self.is_cancelled = False
        self.is_decoding = False
        self.is_fetched = False
        self.is_joined = False
        self.log_at = 0
        self.passes_at = 0
        self.extra_s = 0.0
