"""The brain of one instance: which sequences compute in the next step, and which pages they write."""

from __future__ import annotations

from dataclasses import dataclass

from kvasir.core.commands import Command, FilledBlock, HandOff, NeedPages, Preempt, Publish, Release, ReturnPages, Starved, Step
from kvasir.core.errors import InvariantError
from kvasir.core.events import Cancelled, Event, InstanceLoad, PagesGranted, StepDone, Submitted, Tick
from kvasir.costs.model import CostModel
from kvasir.scheduling.batcher_check import check_pages, check_queues
from kvasir.scheduling.chunking import BatcherConfig
from kvasir.scheduling.queue_order import QueueOrder, first_come
from kvasir.scheduling.queues import Queues
from kvasir.scheduling.sequence import Sequence, sequence_of
from kvasir.scheduling.step_former import StepFormer, chunk_of


@dataclass(frozen=True, slots=True)
class _Starving:
    """Nobody can go on since `since_s`; only sequences submitted before `before` may be preempted for it."""

    since_s: float
    before: int


class Batcher:
    """Continuous batching with chunked prefill, over pages that a pool lends. `now` is in seconds and never goes back.

    At most one Step is outstanding; StepDone answers it, and the next Step comes in the same list when there is work.
    At most one NeedPages is outstanding; PagesGranted answers it. After a short grant the pool is asked again at the next
    other event. When nobody can go on without a page, the youngest is preempted, so that the oldest always makes progress;
    when there is nobody left to preempt, ticks ask again, and after `starve_s` the oldest is Starved.
    """

    def __init__(self, config: BatcherConfig, costs: CostModel | None = None, order: QueueOrder = first_come):
        self._config = config
        self._order = order
        self._queues = Queues()
        self._stash: list[int] = []
        self._former = StepFormer(config, costs, self._queues, self._stash)
        self._flying: list[Sequence] = []
        self._num_submitted = 0
        self._asked: int | None = None  # how many pages the outstanding NeedPages really needs
        self._is_short = False  # the last grant did not cover what was needed
        self._is_held = False  # after a preemption nobody is admitted until somebody leaves
        self._starving: _Starving | None = None

    def handle(self, event: Event, now: float) -> list[Command]:
        """Raises InvariantError for an event that no correct body sends."""
        commands: list[Command] = []
        match event:
            case StepDone():
                self._step_done(event, commands)
            case Submitted():
                self._submitted(event, now)
            case PagesGranted():
                self._pages_granted(event)
            case Cancelled():
                self._cancelled(event, commands)
            case Tick():
                pass
            case _:
                raise InvariantError(f"a Batcher takes no {type(event).__name__}")
        was_refused = isinstance(event, PagesGranted) and self._is_short
        self._go_on(commands, now, may_ask=not was_refused)
        return commands

    def load(self) -> InstanceLoad:
        """The queues now. `free_kv_tokens` counts only the stash; the body adds what the pool has free."""
        queues = self._queues
        return InstanceLoad(
            waiting=len(queues.waiting) + len(queues.ready),
            running=len(queues.running),
            waiting_tokens=sum(seq.remaining for seq in queues if seq.remaining > 1),
            context_tokens=sum(seq.num_tokens for seq in queues.running),
            free_kv_tokens=len(self._stash) * self._config.block_tokens,
        )

    def check(self) -> None:
        """Raises InvariantError unless every page is in exactly one place and the queues agree with each other."""
        check_pages(self._queues, self._stash, self._config.block_tokens)
        check_queues(self._queues, self._flying, self._config.max_batch)

    # --- events ---

    def _submitted(self, event: Submitted, now: float) -> None:
        block_tokens = self._config.block_tokens
        if event.request_id in self._queues:
            raise InvariantError(f"{event.request_id} was submitted twice")
        if not event.num_computed < event.num_tokens < event.max_total_tokens:
            raise InvariantError(f"expected num_computed < num_tokens < max_total_tokens, got {event}")
        if len(event.pages) != -(-event.num_computed // block_tokens):
            raise InvariantError(f"expected pages for exactly num_computed tokens, got {event}")
        rank = (-event.priority, self._order(event, now), self._num_submitted)
        self._num_submitted += 1
        self._queues.add(sequence_of(event, rank=rank, block_tokens=block_tokens))

    def _step_done(self, event: StepDone, commands: list[Command]) -> None:
        if not self._flying:
            raise InvariantError("StepDone without a step in flight")
        flying, self._flying = self._flying, []
        for seq in flying:
            seq.num_computed += seq.in_flight
            seq.in_flight = 0
            if seq.is_cancelled:
                commands.append(Release(seq.id, self._leave(seq)))
                continue
            self._publish(seq, commands)
            if seq.num_computed == seq.num_tokens:
                self._sampled(seq, seq.id in event.finished, commands)

    def _publish(self, seq: Sequence, commands: list[Command]) -> None:
        num_full = seq.num_computed // self._config.block_tokens
        if num_full > seq.num_full:
            commands.append(Publish(seq.id, tuple(FilledBlock(i, seq.pages[i]) for i in range(seq.num_full, num_full))))
            seq.num_full = num_full
            seq.num_leased = max(seq.num_leased, num_full)

    def _sampled(self, seq: Sequence, is_finished: bool, commands: list[Command]) -> None:
        if is_finished or seq.num_tokens + 1 >= seq.max_total_tokens:
            commands.append(Release(seq.id, self._leave(seq)))
        elif seq.hand_off:
            commands.append(HandOff(seq.id, seq.private))
            self._remove(seq)
        else:
            seq.num_tokens += 1

    def _cancelled(self, event: Cancelled, commands: list[Command]) -> None:
        seq = self._queues.get(event.request_id)
        if seq is None:
            return
        if seq.in_flight:  # the engine may still write its pages: release after the step
            seq.is_cancelled = True
            return
        commands.append(Release(seq.id, self._leave(seq)))

    def _pages_granted(self, event: PagesGranted) -> None:
        self._is_short = len(event.pages) < (self._asked or 0)
        self._asked = None
        self._stash.extend(event.pages)

    # --- what follows ---

    def _go_on(self, commands: list[Command], now: float, *, may_ask: bool) -> None:
        if not self._flying and len(self._queues):
            self._form()
            if not self._flying and self._is_short and self._asked is None and self._make_room(commands, now):
                may_ask = True
                self._form()
            if self._flying:
                self._starving = None
                commands.append(Step(tuple(chunk_of(seq) for seq in self._flying)))
        if self._asked is None and may_ask:
            self._ask(commands)
        excess = len(self._stash) - self._config.stash_pages
        if excess > 0 and not len(self._queues):
            commands.append(ReturnPages(tuple(self._stash[-excess:])))
            del self._stash[-excess:]

    def _form(self) -> None:
        self._flying = self._former.form(is_short=self._is_short, is_held=self._is_held)

    def _ask(self, commands: list[Command]) -> None:
        wanted = self._former.pages_wanted()
        if wanted <= 0:
            self._is_short = False
            return
        self._asked = wanted
        commands.append(NeedPages(wanted + self._config.stash_pages // 2))

    def _make_room(self, commands: list[Command], now: float) -> bool:
        """Preempt the youngest page holder but the oldest sequence, once per shortage; or give the oldest up."""
        if self._starving is None:
            self._starving = _Starving(now, before=self._num_submitted)
        oldest = self._queues.oldest
        victims = [seq for seq in self._queues if seq is not oldest and seq.pages and seq.order < self._starving.before]
        if victims:
            youngest = max(victims, key=lambda seq: seq.rank)
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
