"""The brain of one instance: which sequences compute in the next step, and which pages they write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvasir.core.batcher_commands import (
    BatcherCommand,
    Chunk,
    HandOff,
    NeedPages,
    Preempt,
    Publish,
    Release,
    ReturnPages,
    Starved,
    Step,
)
from kvasir.core.errors import InvariantError
from kvasir.core.events import Cancelled, Event, Extended, InstanceLoad, PagesGranted, StepDone, Submitted, Tick
from kvasir.costs.calibration import Calibration
from kvasir.costs.model import CostModel
from kvasir.costs.quick import quick
from kvasir.scheduling.batcher_check import check_decodes, check_pages, check_queues, check_step
from kvasir.scheduling.chunking import BatcherConfig
from kvasir.scheduling.decode_set import DecodeSet
from kvasir.scheduling.queues import Queues
from kvasir.scheduling.sequence import Sequence, rank_of
from kvasir.scheduling.step_former import StepFormer, chunk_of


@dataclass(frozen=True, slots=True)
class _Starving:
    """Nobody can go on since `since_s`; only sequences submitted before `before` may be preempted for it."""

    since_s: float
    before: int


class Batcher:
    """Continuous batching with chunked prefill, over pages that a pool lends. `now` is in seconds and never goes back.

    At most one Step is outstanding; StepDone answers it, and the next Step comes in the same list when there is work.
    What else happens meanwhile takes effect with that StepDone. So whoever repeats a step cuts it short when something happens
    that the next pass should know: hand over the event, and StepDone at the end of the pass under way.
    At most one NeedPages is outstanding; PagesGranted answers it. After a short grant the pool is asked again at the next
    other event. When nobody can go on without a page, the youngest is preempted, so that the oldest always makes progress;
    when there is nobody left to preempt, ticks ask again, and after `starve_s` the oldest is Starved.
    When it is told how long its steps take, it predicts accordingly, and says so in its load.
    """

    def __init__(self, config: BatcherConfig, costs: CostModel | None = None):
        self._config = config
        self._decodes = DecodeSet(config.block_tokens, config.ahead_tokens)
        self._queues = Queues(self._decodes)
        self._stash: list[int] = []
        self._costs = quick(costs) if costs is not None else None
        self._calibration = Calibration(self._costs) if self._costs is not None else None
        self._former = StepFormer(config, self._costs, self._queues, self._stash)
        self._step: Step | None = None  # in flight, `_repeats` times at most: all of `_decodes`, and
        self._repeats = 1
        self._prompts: list[Sequence] = []
        self._leaving: list[Sequence] = []  # decodes in flight that were cancelled
        self._num_submitted = 0
        self._asked: int | None = None  # how many pages the outstanding NeedPages really needs
        self._is_short = False  # the last grant did not cover what was needed
        self._is_held = False  # after a preemption nobody is admitted until somebody leaves
        self._starving: _Starving | None = None

    def handle(self, event: Event, now: float) -> list[BatcherCommand]:
        """What the methods that follow do, said by a message. They raise InvariantError for what no correct body says."""
        match event:
            case StepDone(finished=finished, steps=passes, seconds=seconds):
                if seconds is not None and self._step is not None:
                    chunks = [(seq.in_flight, seq.num_computed, seq.share) for seq in self._prompts]
                    self.saw(chunks, self._step.batch, self._step.context_tokens, seconds)
                return self.step_done(passes, now, finished)
            case Submitted():
                return self.submit(_sequence(event), now, priority=event.priority, rank=event.rank)
            case PagesGranted(pages=pages):
                return self.grant(pages, now)
            case Extended(request_id=request_id, available=available):
                return self.extend(request_id, available, now)
            case Cancelled(request_id=request_id):
                return self.cancel(request_id, now)
            case Tick():
                return self.tick(now)
        raise InvariantError(f"a Batcher takes no {type(event).__name__}")

    def submit(self, seq: Sequence, now: float, *, priority: int = 0, rank: float | None = None) -> list[BatcherCommand]:
        block_tokens = self._config.block_tokens
        if seq.id in self._queues:
            raise InvariantError(f"{seq.id} was submitted twice")
        if not seq.num_computed < seq.num_tokens < seq.max_total_tokens:
            counts = f"{seq.num_computed}, {seq.num_tokens}, {seq.max_total_tokens}"
            raise InvariantError(f"{seq.id}: expected num_computed < num_tokens < max_total_tokens, got {counts}")
        if seq.available is not None and not 0 <= seq.available <= seq.num_tokens:
            raise InvariantError(f"{seq.id}: {seq.available} of {seq.num_tokens} tokens cannot be available")
        num_filled = -(-seq.num_computed // block_tokens)
        if seq.num_leased != num_filled and not (seq.share < 1.0 and seq.num_leased > num_filled):
            raise InvariantError(f"{seq.id}: expected pages for exactly {seq.num_computed} tokens, got {seq.num_leased}")
        seq.rank = (-priority, now if rank is None else rank, self._num_submitted)
        seq.num_full = seq.num_computed // block_tokens
        self._num_submitted += 1
        self._queues.add(seq)
        return self._go_on([], now)

    def extend(self, request_id: str, available: int, now: float) -> list[BatcherCommand]:
        seq = self._queues.get(request_id)
        if seq is not None:
            if seq.available is None or not seq.available <= available <= seq.num_tokens:
                raise InvariantError(f"{request_id}: {seq.available} of {seq.num_tokens} tokens are available, got {available}")
            seq.available = available
            self._queues.place(seq)
        return self._go_on([], now)

    def step_done(self, passes: int, now: float, finished: tuple[str, ...] = ()) -> list[BatcherCommand]:
        commands: list[BatcherCommand] = []
        self._end_step(passes, frozenset(finished) if finished else _NOBODY, commands)
        return self._go_on(commands, now)

    def cancel(self, request_id: str, now: float) -> list[BatcherCommand]:
        commands: list[BatcherCommand] = []
        seq = self._queues.get(request_id)
        if seq is not None:
            self._cancel(seq, commands)
        return self._go_on(commands, now)

    def grant(self, pages: tuple[int, ...], now: float) -> list[BatcherCommand]:
        self._is_short = len(pages) < (self._asked or 0)
        self._asked = None
        self._stash.extend(pages)
        return self._go_on([], now, may_ask=not self._is_short)

    def tick(self, now: float) -> list[BatcherCommand]:
        return self._go_on([], now)

    def decode_chunks(self) -> Iterator[Chunk]:
        """The decoding sequences of the Step in flight, as they are in its first pass; valid until StepDone."""
        return self._decodes.chunks()

    @property
    def is_short(self) -> bool:
        """Whether the pool gave fewer pages than are needed; it is asked again at the next event, a Tick at the latest."""
        return self._is_short

    @property
    def waiting_tokens(self) -> int:
        """Of all prompts, those that are not computed as of the last StepDone."""
        tokens = 0
        for seq in self._queues.waiting:
            tokens += seq.num_tokens - seq.num_computed
        for seq in self._queues.begun:
            tokens += seq.num_tokens - seq.num_computed
        for seq in self._queues.idle:
            tokens += seq.num_tokens - seq.num_computed
        return tokens

    def load(self, *, waiting: int = 0, waiting_tokens: int = 0, free_kv_tokens: int = 0) -> InstanceLoad:
        """The queues as of the last StepDone and the pages in the stash, beside what only the body knows of."""
        queues = self._queues
        context_tokens, num_held_up = self._decodes.context_tokens, 0
        for seq in (*queues.paused, *queues.begun):
            context_tokens += seq.num_tokens
        for seq in queues.idle:
            if seq.has_begun:
                context_tokens += seq.num_tokens
                num_held_up += 1
        return InstanceLoad(
            waiting=waiting + len(queues.waiting) + len(queues.ready) + len(queues.idle) - num_held_up,
            running=queues.num_running + num_held_up,
            waiting_tokens=waiting_tokens + self.waiting_tokens,
            context_tokens=context_tokens,
            free_kv_tokens=free_kv_tokens + len(self._stash) * self._config.block_tokens,
            prefill_scale=self._calibration.prefill_scale if self._calibration is not None else None,
            decode_scale=self._calibration.decode_scale if self._calibration is not None else None,
        )

    def saw(self, chunks: list[tuple[int, int, float]], batch: int, context_tokens: int, seconds: float) -> None:
        """The engine took `seconds` for chunks (new tokens, cached ones, share of layers) and a token for each of a `batch`."""
        costs, calibration = self._costs, self._calibration
        if costs is not None and calibration is not None:
            prefill_s = sum([share * costs.prefill_s(new_tokens, cached) for new_tokens, cached, share in chunks], 0.0)
            calibration.saw(prefill_s, costs.decode_step_s(batch, context_tokens), seconds)

    def check(self) -> None:
        """Raises InvariantError unless every page is in exactly one place and the queues agree with each other."""
        check_decodes(self._decodes, self._config)
        check_pages(self._queues, self._stash, self._config.block_tokens)
        check_queues(self._queues)
        check_step(self._step, self._prompts, self._queues, self._config.max_batch)

    # --- what happened ---

    def _end_step(self, passes: int, finished: frozenset[str], commands: list[BatcherCommand]) -> None:
        if self._step is None:
            raise InvariantError("a step is done and none was in flight")
        if not (1 if self._prompts or finished else 0) <= passes <= self._repeats:
            raise InvariantError(f"a step of at most {self._repeats} passes was in flight, {passes} were made")
        self._step = None
        touched = self._decodes.advance(passes)
        if finished or self._leaving:
            touched = self._with_leavers(touched, finished)
        if touched:
            if len(touched) > 1:
                touched.sort(key=rank_of)
            for seq in touched:
                self._decoded(seq, seq.id in finished, commands)
        prompts = self._prompts
        if not prompts:
            return
        self._prompts = []
        for seq in prompts:
            seq.num_computed += seq.in_flight
            seq.in_flight = 0
            self._computed(seq, seq.id in finished, commands)

    def _with_leavers(self, due: list[Sequence], finished: frozenset[str]) -> list[Sequence]:
        """`due`, and the decodes that end before they are due."""
        by_id = {seq.id: seq for seq in (*due, *self._leaving)}
        for request_id in finished:
            seq = self._queues.get(request_id)
            if seq is not None and seq.due:
                by_id[request_id] = seq
        self._leaving = []
        for seq in by_id.values():
            self._decodes.settle(seq)
        return list(by_id.values())

    def _decoded(self, seq: Sequence, is_finished: bool, commands: list[BatcherCommand]) -> None:
        """Something happens to a settled member of the decodes: it is cancelled, ends, or comes to a block's boundary."""
        if seq.is_cancelled:
            commands.append(Release(seq.id, self._leave(seq)))
            return
        self._publish(seq, commands)
        if is_finished or seq.num_computed >= seq.end:
            self._sampled(seq, is_finished, commands)
        elif seq.num_computed == len(seq.pages) * self._config.block_tokens:
            self._queues.place(seq)
        else:
            self._decodes.schedule(seq)

    def _computed(self, seq: Sequence, is_finished: bool, commands: list[BatcherCommand]) -> None:
        """A chunk of a prompt is computed."""
        is_complete = seq.num_computed == seq.num_tokens
        if seq.is_cancelled or (seq.is_stage and is_complete):
            commands.append(Release(seq.id, self._leave(seq)))
            return
        if not seq.is_stage:
            self._publish(seq, commands)
        if is_complete:
            self._sampled(seq, is_finished, commands)
        else:
            self._queues.place(seq)

    def _publish(self, seq: Sequence, commands: list[BatcherCommand]) -> None:
        num_full = seq.num_computed // self._config.block_tokens
        if num_full > seq.num_full:
            commands.append(Publish(seq.id, seq.num_full, seq.pages[seq.num_full : num_full]))
            seq.num_full = num_full
            seq.num_leased = max(seq.num_leased, num_full)

    def _sampled(self, seq: Sequence, is_finished: bool, commands: list[BatcherCommand]) -> None:
        """All tokens of the sequence are computed, and one was drawn after them."""
        if is_finished or seq.num_computed + 1 >= seq.max_total_tokens:
            commands.append(Release(seq.id, self._leave(seq)))
        elif seq.hand_off:
            private = seq.private
            self._remove(seq)
            commands.append(HandOff(seq.id, private))
        else:
            seq.num_tokens = seq.num_computed + 1
            seq.available, seq.share = None, 1.0
            self._queues.place(seq)

    def _cancel(self, seq: Sequence, commands: list[BatcherCommand]) -> None:
        if not seq.in_flight and not seq.due:
            commands.append(Release(seq.id, self._leave(seq)))
        elif not seq.is_cancelled:  # the engine may still write its pages: release after the step
            seq.is_cancelled = True
            if seq.due:
                self._leaving.append(seq)

    # --- what follows ---

    def _go_on(self, commands: list[BatcherCommand], now: float, *, may_ask: bool = True) -> list[BatcherCommand]:
        """`commands`, and what is to be done now."""
        is_busy = self._queues.is_busy
        if is_busy and self._step is None:
            if self._is_short and self._asked is None and self._former.pages_wanted() <= 0:  # who left has left enough
                self._end_shortage()
            step = self._form()
            if step is None and self._is_short and self._asked is None and self._make_room(commands, now):
                may_ask = True
                step = self._form()
            if step is not None:
                self._step, self._starving = step, None
                commands.append(step)
        if may_ask and self._asked is None:
            self._ask(commands)
        if not is_busy or not self._queues.is_busy:
            self._return_excess(commands)
        return commands

    def _return_excess(self, commands: list[BatcherCommand]) -> None:
        """Who has nothing to do keeps no more than a few pages at hand."""
        excess = len(self._stash) - self._config.stash_pages
        if excess > 0:
            commands.append(ReturnPages(tuple(self._stash[-excess:])))
            del self._stash[-excess:]

    def _form(self) -> Step | None:
        self._prompts = self._former.form(is_short=self._is_short, is_held=self._is_held)
        decodes = self._decodes
        batch = len(decodes.members)
        self._repeats = 1
        if self._prompts:
            chunks = tuple([chunk_of(seq) for seq in self._prompts])
            return Step(chunks, batch, decodes.context_tokens)
        if batch:
            most = 1 if self._former.puts_off else self._config.max_repeats
            if most > 1:
                self._repeats = min(most, decodes.passes_until_due())
            return Step((), batch, decodes.context_tokens, self._repeats)
        return None

    def _ask(self, commands: list[BatcherCommand]) -> None:
        wanted = self._former.pages_wanted()
        if wanted <= 0:
            self._end_shortage()
            return
        self._asked = wanted
        commands.append(NeedPages(wanted + self._config.stash_pages // 2))

    def _end_shortage(self) -> None:
        self._is_short = False
        self._starving = None

    def _make_room(self, commands: list[BatcherCommand], now: float) -> bool:
        """Preempt the youngest page holder but the oldest sequence, once per shortage; or give the oldest up.

        Somebody lacks a page: who waits for the pipeline's stage before wants none.
        """
        if self._starving is None:
            self._starving = _Starving(now, before=self._num_submitted)
        oldest = self._queues.oldest
        victims = [seq for seq in self._queues if seq is not oldest and seq.pages and seq.order < self._starving.before]
        if victims:
            youngest = max(victims, key=rank_of)
            commands.append(Preempt(youngest.id, self._leave(youngest)))
            self._is_held = True
            return True
        waited_s = now - self._starving.since_s
        if waited_s < self._config.starve_s:
            return False
        commands.append(Starved(oldest.id, self._leave(oldest), waited_s))
        self._starving = None
        return True

    def _leave(self, seq: Sequence) -> tuple[int, ...]:
        """Forget the sequence; keep of its private pages what the stash lacks, and return the others."""
        private = seq.private
        keep = max(0, min(len(private), self._config.stash_pages - len(self._stash)))
        self._stash.extend(private[:keep])
        self._remove(seq)
        return private[keep:]

    def _remove(self, seq: Sequence) -> None:
        self._queues.remove(seq)
        self._is_held = False


_NOBODY: Final[frozenset[str]] = frozenset()


def _sequence(event: Submitted) -> Sequence:
    return Sequence(
        event.request_id,
        num_tokens=event.num_tokens,
        num_computed=event.num_computed,
        max_total_tokens=event.max_total_tokens,
        pages=event.pages,
        hand_off=event.hand_off,
        share=event.share,
        available=event.available,
        is_stage=event.is_stage,
    )
