"""The live body of one instance: carries the Batcher's commands out on an engine and the node's pool.

Three things run: the inbox (what the hub wants), the engine loop (one step at a time) and the heartbeat. Every decision is
the Batcher's; this body keeps the tokens, because the brain only knows their number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, assert_never

import numpy as np
import structlog
from msgspec.structs import replace

from kvasir.cluster.messages import (
    CancelRun,
    ExtendRun,
    FromInstance,
    HandedOff,
    HelloInstance,
    InstanceReport,
    Pace,
    Phase,
    PipelineReady,
    PrefixPlan,
    RunFailed,
    RunRequest,
    Shutdown,
    StageComputed,
    StageLeft,
    StepOutput,
    ToInstance,
    TokenOut,
)
from kvasir.cluster.pool_client import Pool
from kvasir.cluster.stage_run import StageRun, open_pipeline
from kvasir.core.batcher_commands import Chunk, HandOff, NeedPages, Preempt, Publish, Release, ReturnPages, Starved, Step
from kvasir.core.errors import ClusterError, KvasirError, KvLost
from kvasir.core.events import Cancelled, Event, Extended, InstanceInfo, InstanceLoad, PagesGranted, StepDone, Submitted, Tick
from kvasir.core.keys import BlockKey, block_keys
from kvasir.core.pool_events import KeyedSlot
from kvasir.core.request import FinishReason
from kvasir.engine.interface import Engine, SampledToken, SequenceSlice, StepResult
from kvasir.scheduling.batcher import Batcher

HEARTBEAT_S = 0.5
OFFER_S = 30.0
"""How long a handed-off prompt waits in the pool for the instance that decodes it."""


@dataclass(slots=True)
class _Sequence:
    """What the body knows of a running request: its tokens so far and the keys of its full blocks.

    It has a `stage` while a pipeline computes its prompt.
    """

    request: RunRequest
    phase: Phase
    tokens: list[int]
    keys: list[BlockKey] = field(default_factory=list)
    cached: int | None = None
    cancelled: bool = False
    submitted: bool = False
    stage: StageRun | None = None

    def key(self, index: int, block_tokens: int) -> BlockKey:
        """The key of full block `index`; keys are chained as blocks fill."""
        if index >= len(self.keys):
            done = len(self.keys)
            parent = self.keys[-1] if self.keys else self.request.root
            self.keys += block_keys(parent, self.tokens[done * block_tokens :], block_tokens)
        return self.keys[index]


class InstanceBody:
    """Runs until the hub says Shutdown, the engine fails, or its task is cancelled.

    While others need its cores it pauses after each step for as long as the step took, as long as a token still comes
    every `max_gap_s`.
    """

    def __init__(
        self,
        info: InstanceInfo,
        engine: Engine,
        batcher: Batcher,
        pool: Pool,
        *,
        max_gap_s: float,
        chunk_tokens: int,
        receive: Callable[[], Coroutine[Any, Any, ToInstance]],
        send: Callable[[FromInstance], bool],
    ):
        self._info = info
        self._engine = engine
        self._batcher = batcher
        self._pool = pool
        self._max_gap_s = max_gap_s
        self._chunk_tokens = chunk_tokens
        self._pauses = False
        self._receive = receive
        self._send = send
        self._sequences: dict[str, _Sequence] = {}
        self._parked: dict[str, None] = {}  # preempted: they hold nothing until somebody leaves
        self._landing: set[str] = set()  # whose first step may wait for blocks that come from elsewhere
        self._steps: asyncio.Queue[Step] = asyncio.Queue(maxsize=2)
        self._log = structlog.get_logger().bind(instance=info.id)
        self._clock = asyncio.get_running_loop().time
        self.on_event: Callable[[Event, float], object] = lambda event, now: None
        """Hears each event and its time before the Batcher does: a recording of them replays to the same commands."""
        self._tasks = asyncio.TaskGroup()
        self._block_tokens = engine.spec.block_tokens

    async def run(self) -> None:
        self._send(HelloInstance(self._info))
        async with self._tasks as tasks:
            engine_loop = tasks.create_task(self._run_steps())
            heartbeat = tasks.create_task(self._beat())
            await self._take_messages()
            engine_loop.cancel()
            heartbeat.cancel()

    # --- what the hub wants ------------------------------------------------------------------------------------

    async def _take_messages(self) -> None:
        while True:
            match await self._receive():
                case RunRequest() as request:
                    self._start(request)
                case ExtendRun(run=run, available=available):
                    self._extend(run, available)
                case CancelRun(run=run):
                    self._cancel(run)
                case Pace(pauses=pauses):
                    self._pauses = pauses
                case Shutdown():
                    return
                case other:
                    assert_never(other)

    def _start(self, request: RunRequest) -> None:
        if request.run in self._sequences:
            self._fail(request.run, "the run is here already")
            return
        sequence = _Sequence(request, request.phase, np.frombuffer(request.tokens, dtype="<u4").tolist())
        self._sequences[request.run] = sequence
        if request.stage is not None:
            sequence.stage = StageRun(request.stage)
        if request.stage is not None and not request.stage.is_last:
            self._submit(sequence, request.stage.pages, request.stage.cached)
        else:
            self._spawn(self._admit(sequence))

    def _cancel(self, run: str) -> None:
        sequence = self._sequences.get(run)
        if sequence is None:
            return
        if run in self._parked:
            self._forget(run)
            return
        sequence.cancelled = True
        if sequence.submitted:
            self._apply(Cancelled(run))

    async def _admit(self, sequence: _Sequence) -> None:
        """Take the KV that exists already, then queue the sequence."""
        run = sequence.request.run
        try:
            if sequence.stage is not None:
                pages, computed = await self._open_pipeline(sequence, sequence.stage)
            elif sequence.phase is Phase.DECODE:
                pages, computed = await self._take_over(sequence)
            else:
                pages, computed = await self._prefix(sequence)
        except KvasirError as error:
            self._forget(run)
            self._leave_pipeline(sequence)
            self._fail(run, str(error))
            return
        if sequence.cancelled:
            self._leave(run, ())
            return
        self._submit(sequence, pages, computed)
        if sequence.stage is not None:
            self._tell(PipelineReady(run, self._info.id, sequence.stage.plan))

    def _submit(self, sequence: _Sequence, pages: tuple[int, ...], computed: int) -> None:
        sequence.submitted = True
        stage = sequence.stage
        self._apply(
            Submitted(
                request_id=sequence.request.run,
                num_tokens=len(sequence.tokens),
                num_computed=computed,
                max_total_tokens=sequence.request.max_total_tokens,
                pages=tuple(pages),
                hand_off=sequence.phase is Phase.PREFILL,
                priority=sequence.request.priority,
                rank=sequence.request.rank,
                share=1.0 if stage is None else stage.share,
                available=None if stage is None or stage.plan.number == 0 else computed,
                is_stage=stage is not None and not stage.plan.is_last,
            )
        )

    async def _take_over(self, sequence: _Sequence) -> tuple[tuple[int, ...], int]:
        """What was handed off: it is on offer on this node, or comes from another. The newest token is not computed yet."""
        run, source = sequence.request.run, sequence.request.source
        computed = len(sequence.tokens) - 1
        if source is None:
            return await self._pool.adopt(run), computed
        keys = self._full_keys(sequence, computed)
        count, tenant = -(-computed // self._block_tokens), sequence.request.tenant
        return await self._pool.receive(run, keys, count, source, tenant=tenant), computed

    async def _prefix(self, sequence: _Sequence) -> tuple[tuple[int, ...], int]:
        """The cached prefix; at least one token is left to compute, since its logits are needed."""
        run, plan, tenant = sequence.request.run, sequence.request.prefix, sequence.request.tenant
        keys = self._full_keys(sequence, len(sequence.tokens) - 1)
        if plan is None:
            pages = await self._pool.lease(run, keys, tenant=tenant)
        else:
            plan = replace(plan, hidden_s=0.0) if sequence.stage else self._for_one_chunk(plan, len(sequence.tokens))
            pages = await self._pool.bring(run, keys, plan, tenant=tenant)
            self._landing.add(run)
        if sequence.cached is None:
            sequence.cached = len(pages) * self._block_tokens
        return pages, len(pages) * self._block_tokens

    async def _open_pipeline(self, sequence: _Sequence, stage: StageRun) -> tuple[tuple[int, ...], int]:
        """The cached prefix, and pages for the rest, of which no stage is the owner yet."""
        prefix, cached = await self._prefix(sequence)
        plan, run, num_tokens = replace(stage.plan, cached=cached), sequence.request.run, len(sequence.tokens)
        stage.plan = await open_pipeline(self._pool, run, plan, prefix, num_tokens=num_tokens, spec=self._engine.spec)
        return stage.plan.pages, cached

    def _extend(self, run: str, available: int) -> None:
        """The stage before is so far. Once it is through, nobody but this instance writes into the pages any more."""
        sequence = self._sequences.get(run)
        if sequence is None or sequence.stage is None:
            return
        if sequence.stage.plan.is_last and available == len(sequence.tokens):
            self._spawn(self._take_pages_over(sequence, sequence.stage))
        else:
            self._apply(Extended(run, available))

    async def _take_pages_over(self, sequence: _Sequence, stage: StageRun) -> None:
        """From here on the run is like any other of this instance."""
        run = sequence.request.run
        try:
            await self._pool.adopt(run)
        except KvasirError as error:
            if self._sequences.get(run) is sequence:
                self._apply(Cancelled(run))
                self._fail(run, str(error))
            return
        stage.taken_over = True
        if self._sequences.get(run) is not sequence:
            self._pool.release(run)
            return
        if stage.unpublished:
            self._pool.put_end(run, stage.unpublished)
        if not sequence.cancelled:
            self._apply(Extended(run, len(sequence.tokens)))

    def _for_one_chunk(self, plan: PrefixPlan, num_tokens: int) -> PrefixPlan:
        """Only the first step hides what is still coming."""
        rest = max(1, num_tokens - plan.blocks * self._block_tokens)
        return replace(plan, hidden_s=plan.hidden_s * min(1.0, self._chunk_tokens / rest))

    def _full_keys(self, sequence: _Sequence, num_tokens: int) -> tuple[BlockKey, ...]:
        """Of the blocks that the first `num_tokens` fill."""
        full = num_tokens // self._block_tokens
        if full:
            sequence.key(full - 1, self._block_tokens)
        return tuple(sequence.keys[:full])

    # --- what the Batcher wants --------------------------------------------------------------------------------

    def _apply(self, event: Event) -> None:
        now = self._clock()
        self.on_event(event, now)
        for command in self._batcher.handle(event, now):
            match command:
                case Step():
                    self._steps.put_nowait(command)
                case Publish(request_id=run, first=first, pages=pages):
                    sequence, tokens = self._sequences[run], self._block_tokens
                    keyed = tuple(KeyedSlot(sequence.key(index, tokens), page) for index, page in enumerate(pages, first))
                    self._publish(sequence, keyed)
                case HandOff(request_id=run, pages=pages):
                    self._forget(run)
                    self._spawn(self._hand_off(run, pages))
                case Release(request_id=run, pages=pages):
                    self._leave(run, pages)
                case Preempt(request_id=run, pages=pages):
                    self._preempt(self._sequences[run], pages)
                case Starved(request_id=run, pages=pages, waited_s=waited_s):
                    self._leave(run, pages)
                    self._fail(run, f"no KVCache block became free for {waited_s:.0f} s; give the pool more --dram")
                case NeedPages(count=count):
                    self._spawn(self._need_pages(count))
                case ReturnPages(pages=pages):
                    self._pool.revoke(pages)
                case _:
                    raise AssertionError(f"the Batcher said {command!r}")

    def _publish(self, sequence: _Sequence, blocks: tuple[KeyedSlot, ...]) -> None:
        if sequence.stage is None or sequence.stage.taken_over:
            self._pool.put_end(sequence.request.run, blocks)
        else:
            sequence.stage.unpublished += blocks

    async def _hand_off(self, run: str, pages: tuple[int, ...]) -> None:
        try:
            await self._pool.offer(run, pages, OFFER_S)
        except KvasirError as error:
            self._pool.release(run, pages)
            self._fail(run, f"hand-off: {error}")
            return
        self._tell(HandedOff(run, self._info.id))

    def _preempt(self, sequence: _Sequence, pages: tuple[int, ...]) -> None:
        """Give everything back and queue the sequence again, to be recomputed here from its tokens so far. A stage does not
        come back: the others would have to start anew, too.
        """
        if sequence.stage is not None:
            self._leave(sequence.request.run, pages)
            self._fail(sequence.request.run, "a pipeline was stopped for lack of KVCache blocks")
            return
        self._pool.release(sequence.request.run, pages)
        sequence.submitted = False
        if sequence.phase is Phase.DECODE:
            sequence.phase = Phase.BOTH
        self._parked[sequence.request.run] = None

    def _leave(self, run: str, pages: tuple[int, ...]) -> None:
        """The run is over here: give back what is this instance's."""
        sequence = self._sequences[run]
        self._forget(run)
        if sequence.stage is None or sequence.stage.taken_over:
            self._pool.release(run, pages)
        self._leave_pipeline(sequence)

    def _leave_pipeline(self, sequence: _Sequence) -> None:
        """Its slots may go back, as far as this instance is concerned; a stage that is through has said so already."""
        if sequence.stage is not None and sequence.stage.computed < len(sequence.tokens):
            self._tell(StageLeft(sequence.request.run, self._info.id))

    def _forget(self, run: str) -> None:
        """The run has left; who was preempted longest ago may come back: a lease taken earlier would pin what was freed."""
        del self._sequences[run]
        self._parked.pop(run, None)
        self._landing.discard(run)
        if self._parked:
            back = next(iter(self._parked))
            del self._parked[back]
            self._spawn(self._admit(self._sequences[back]))

    async def _need_pages(self, count: int) -> None:
        try:
            pages = await self._pool.reserve(count)
        except KvasirError as error:
            self._log.warning("no pages", error=str(error))
            pages = ()
        self._apply(PagesGranted(pages))

    # --- the engine loop ---------------------------------------------------------------------------------------

    async def _run_steps(self) -> None:
        since_s = self._clock()
        while True:
            if self._steps.empty():
                step, since_s = await self._steps.get(), self._clock()
            else:
                step = self._steps.get_nowait()
            slices = [self._slice(chunk) for chunk in (*self._batcher.decode_chunks(), *step.chunks)]
            result = await self._compute(slices)
            for part in slices:
                if part.stage is not None:
                    self._stage_computed(part)
            outputs = tuple(self._grow(run, sampled) for run, sampled in result.tokens.items())
            finished = tuple(out.run for out in outputs if out.finish is not None)
            started_s, since_s = since_s, self._clock()
            self._apply(StepDone(finished, seconds=None if self._have_landed(slices) else since_s - started_s))
            if outputs:
                ends_first = sorted(outputs, key=lambda out: out.finish is None)
                self._tell(StepOutput(self._info.id, tuple(ends_first)))
            if self._pauses:
                await asyncio.sleep(max(0.0, min(result.seconds, self._max_gap_s - result.seconds)))
                since_s = self._clock()

    def _stage_computed(self, part: SequenceSlice) -> None:
        """Tell how far a stage is. The last, when it is through, has a sequence like any other."""
        sequence = self._sequences[part.request_id]
        stage = sequence.stage
        if stage is None or sequence.cancelled:
            return
        stage.computed = part.start + len(part.tokens)
        if stage.plan.is_last and stage.computed == len(sequence.tokens):
            sequence.stage = None
        self._tell(StageComputed(part.request_id, self._info.id, stage.computed))

    def _have_landed(self, slices: list[SequenceSlice]) -> bool:
        """Whether the step may have waited for blocks from elsewhere; those of its sequences are here now."""
        landed = self._landing.intersection([s.request_id for s in slices]) if self._landing else None
        if landed:
            self._landing -= landed
        return bool(landed)

    async def _compute(self, slices: list[SequenceSlice]) -> StepResult:
        """A step; whoever's cached blocks never come leaves it, and the others are computed again, to the same KV."""
        while slices:
            try:
                return await self._engine.step(slices)
            except KvLost as lost:
                slices = [s for s in slices if s.request_id not in lost.request_ids]
                for run in lost.request_ids:
                    self._sequences[run].cancelled = True
                    self._apply(Cancelled(run))
                    self._fail(run, str(lost))
        return StepResult({}, 0.0)

    def _slice(self, chunk: Chunk) -> SequenceSlice:
        sequence = self._sequences[chunk.request_id]
        return SequenceSlice(
            request_id=chunk.request_id,
            tokens=sequence.tokens[chunk.start : chunk.start + chunk.length],
            start=chunk.start,
            pages=chunk.pages,
            sampling=sequence.request.sampling if chunk.samples else None,
            stage=sequence.stage.part(chunk.start, self._engine.spec) if sequence.stage is not None else None,
        )

    def _grow(self, run: str, sampled: SampledToken) -> TokenOut:
        """Append the new token; the first of a prefill also tells how much of the prompt was cached."""
        sequence = self._sequences[run]
        sequence.tokens.append(sampled.token)
        cached, sequence.cached = sequence.cached, None
        return TokenOut(
            run=run,
            token=sampled.token,
            logprob=sampled.logprob,
            top=sampled.top,
            cached=cached,
            finish=_finish(sequence),
        )

    # --- the rest ----------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        while True:
            self._send(InstanceReport(self._info.id, self._info.epoch, self._load()))
            self._apply(Tick())
            await asyncio.sleep(HEARTBEAT_S)

    def _load(self) -> InstanceLoad:
        """What was preempted is with nobody else and waits, too."""
        tokens = sum(len(self._sequences[run].tokens) for run in self._parked)
        return self._batcher.load(waiting=len(self._parked), waiting_tokens=tokens)

    def _fail(self, run: str, error: str) -> None:
        self._tell(RunFailed(run, self._info.id, error))

    def _tell(self, message: FromInstance) -> None:
        """What must not be lost: a hub that takes no more ends this instance, and another replays its requests."""
        if not self._send(message):
            raise ClusterError(f"the hub takes no more messages: {type(message).__name__} was not sent")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.create_task(work)


def _finish(sequence: _Sequence) -> FinishReason | None:
    request = sequence.request
    if sequence.tokens[-1] in request.stop_tokens:
        return FinishReason.STOP
    if len(sequence.tokens) >= request.max_total_tokens:
        return FinishReason.LENGTH
    return None
