"""The Batcher against a naive pool and model: no page in two places, published pages never written, prompts in order of rank,
nobody ahead of its pipeline, everybody gets an end."""

import math
from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
from kvasir.core.events import Cancelled, Event, Extended, PagesGranted, StepDone, Submitted, Tick
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.chunking import BatcherConfig

BLOCK = 4
COSTS = FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 0.0, 0.0), 0.0, 1e9)


@dataclass
class Run:
    """What the naive body knows of a request."""

    tokens: int
    total: int
    hand_off: bool
    priority: int
    place: float = math.inf
    available: int | None = None
    is_stage: bool = False
    computed: int = 0
    order: int = 0
    has_begun: bool = False
    is_cancelled: bool = False
    pages: list[int] = field(default_factory=list)
    lease: list[int] = field(default_factory=list)
    tail: int | None = None
    published: int = 0

    @property
    def rank(self) -> tuple[int, float, int]:
        return (-self.priority, self.place, self.order)

    @property
    def computable(self) -> int:
        return (self.tokens if self.available is None else self.available) - self.computed

    @property
    def is_prompt(self) -> bool:
        return self.tokens - self.computed > 1 or self.is_stage or self.available is not None

    @property
    def end(self) -> int:
        return self.tokens if self.hand_off or self.is_stage else self.total - 1

    @property
    def private(self) -> set[int]:
        return set(self.pages) - set(self.lease) - {self.tail}


class BatcherMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(6, 40),
        stash=st.integers(0, 6),
        batch=st.integers(1, 5),
        step=st.integers(6, 40),
        ahead=st.integers(1, 6),
        repeats=st.sampled_from([1, 3, 1000]),
    )
    def start(self, num_pages: int, stash: int, batch: int, step: int, ahead: int, repeats: int) -> None:
        self.config = BatcherConfig(
            block_tokens=BLOCK,
            max_batch=batch,
            max_step_tokens=step,
            max_mixed_tokens=8,
            ahead_tokens=ahead,
            stash_pages=stash,
            starve_s=5.0,
            max_repeats=repeats,
        )
        self.batcher = Batcher(self.config, COSTS)
        self.num_pages = num_pages
        self.free = list(range(num_pages))
        self.lent: set[int] = set()  # granted to the Batcher, not given back or published
        self.readers: dict[int, int] = {}  # published page → leases on it
        self.runs: dict[str, Run] = {}
        self.step: Step | None = None
        self.chunks: list[Chunk] = []  # all that the step computes in its first pass
        self.is_new = False  # the step is of the last event
        self.was_short = False
        self.asked: int | None = None
        self.now = 0.0
        self.count = 0
        self.num_submitted = 0
        self.ends: dict[str, str] = {}
        self.is_draining = False

    # --- what may happen ---

    @rule(
        prompt=st.integers(1, 60),
        output=st.integers(1, 30),
        hand_off=st.booleans(),
        priority=st.integers(0, 1),
        deadline=st.integers(0, 3),
        shared=st.integers(0, 4),
    )
    def submit(self, prompt: int, output: int, hand_off: bool, priority: int, deadline: int, shared: int) -> None:
        run = Run(prompt, prompt + output, hand_off, priority, place=deadline)
        donors = [r for r in self.runs.values() if r.published]
        if donors:
            donor = donors[shared % len(donors)]
            run.lease = donor.lease[: min(donor.published, (prompt - 1) // BLOCK, shared)]
            run.published = len(run.lease)
            run.computed = run.published * BLOCK
        self._submit(f"r{self.count}", run)

    @rule(
        prompt=st.integers(1, 60),
        available=st.none() | st.integers(0, 60),
        is_stage=st.booleans(),
        hand_off=st.booleans(),
        deadline=st.integers(0, 3),
    )
    def submit_stage(self, prompt: int, available: int | None, is_stage: bool, hand_off: bool, deadline: int) -> None:
        if available is not None:
            available = min(available, prompt)
        run = Run(prompt, prompt + 9, hand_off and not is_stage, 0, place=deadline, available=available, is_stage=is_stage)
        self._submit(f"r{self.count}", run)

    @rule(index=st.integers(0, 20), more=st.integers(0, 30))
    def extend(self, index: int, more: int) -> None:
        run = self.runs.get(f"r{index}")
        if run is None or run.available is None:
            self._handle(Extended(f"r{self.count}", 3))  # long gone
            return
        run.available = min(run.tokens, run.available + more)
        self._handle(Extended(f"r{index}", run.available))

    @precondition(lambda self: len(self.free) > 4)
    @rule(prompt=st.integers(1, 12), output=st.integers(2, 30))
    def adopt(self, prompt: int, output: int) -> None:
        """A handed-off prompt with its first token: full blocks published, the tail private to the lease."""
        run = Run(prompt + 1, prompt + output, hand_off=False, priority=0, computed=prompt)
        for _ in range(prompt // BLOCK):
            run.lease.append(self.free.pop(0))
        run.published = len(run.lease)
        if prompt % BLOCK:
            run.tail = self.free.pop(0)
        self._submit(f"r{self.count}", run)

    @precondition(lambda self: self.step is not None)
    @rule(data=st.data())
    def step_done(self, data: st.DataObject) -> None:
        assert self.step is not None
        steps = data.draw(st.integers(0 if not self.step.chunks else 1, self.step.repeats))
        sampled = [c.request_id for c in self.chunks if c.samples] if steps else []
        self._step_done({name for name in sampled if data.draw(st.integers(0, 7)) == 0}, steps)

    @precondition(lambda self: self.asked is not None)
    @rule(short=st.integers(0, 3))
    def grant(self, short: int) -> None:
        assert self.asked is not None
        self._grant(0 if short == 3 else max(0, self.asked - short))

    @rule(index=st.integers(0, 20))
    def cancel(self, index: int) -> None:
        if f"r{index}" in self.runs:
            self.runs[f"r{index}"].is_cancelled = True
        self._handle(Cancelled(f"r{index}"))

    @rule(seconds=st.floats(0, 3))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self._handle(Tick())

    @invariant()
    def holds(self) -> None:
        self.batcher.check()
        everywhere = [*self.free, *self.lent, *self.readers, *(r.tail for r in self.runs.values() if r.tail is not None)]
        assert sorted(everywhere) == list(range(self.num_pages))
        if self.step is not None and self.is_new:
            self._check_ranks(self.step)

    def teardown(self) -> None:
        """With an honest pool and a patient body, everybody comes to an end and every page comes home."""
        if not hasattr(self, "batcher"):
            return
        self.is_draining = True
        for name, run in list(self.runs.items()):
            if run.available is not None:
                run.available = run.tokens
                self._handle(Extended(name, run.tokens))
        for _ in range(5000):
            if not self.runs and self.asked is None:
                break
            self.now += 0.5
            if self.step is not None:
                self._step_done(set(), self.step.repeats)
            elif self.asked is not None:
                self._grant(self.asked)
            else:
                self._handle(Tick())
            self.batcher.check()
        assert not self.runs, "somebody starved"
        assert len(self.lent) <= self.config.stash_pages
        assert self.batcher.load().free_kv_tokens == len(self.lent) * BLOCK

    # --- the naive body ---

    def _submit(self, name: str, run: Run) -> None:
        self.count += 1
        for page in run.lease:
            self.readers[page] = self.readers.get(page, 0) + 1
        run.pages = [*run.lease, *([run.tail] if run.tail is not None else [])]
        self.runs[name] = run
        self._handle(self._submission(name, run))

    def _submission(self, name: str, run: Run) -> Submitted:
        run.order = self.num_submitted
        self.num_submitted += 1
        return Submitted(
            name,
            run.tokens,
            run.computed,
            run.total,
            tuple(run.pages),
            run.hand_off,
            run.priority,
            rank=run.place,
            share=0.5 if run.is_stage or run.available is not None else 1.0,
            available=run.available,
            is_stage=run.is_stage,
        )

    def _step_done(self, finished: set[str], steps: int) -> None:
        step, self.step = self.step, None
        assert step is not None
        for chunk in self.chunks:
            run = self.runs[chunk.request_id]
            is_decode = chunk not in step.chunks
            for last in [n == steps for n in range(1, steps + 1)]:  # one pass after another
                run.computed += chunk.length
                is_complete = run.computed == run.tokens
                assert chunk.samples == (is_complete and not run.is_stage)
                assert is_complete or not is_decode
                if chunk.samples and not (last and chunk.request_id in finished) and not run.hand_off:
                    run.tokens += 1
                    run.available = None
        self._handle(StepDone(tuple(sorted(finished)), steps))

    def _grant(self, count: int) -> None:
        self.was_short |= count < self.asked if self.asked is not None else False
        self.asked = None
        pages, self.free = self.free[:count], self.free[count:]
        self.lent.update(pages)
        self._handle(PagesGranted(tuple(pages)))

    def _handle(self, event: Event) -> None:
        again: list[str] = []
        self.is_new = False
        for command in self.batcher.handle(event, self.now):
            self._carry_out(command, again)
        for name in again:
            self._handle(self._submission(name, self.runs[name]))

    def _carry_out(self, command: BatcherCommand, again: list[str]) -> None:
        match command:
            case Step():
                self._check_step(command)
                self.step = command
                self.is_new = True
            case Publish():
                run = self.runs[command.request_id]
                assert not run.is_stage
                for index, page in enumerate(command.pages, command.first):
                    assert index == run.published
                    assert run.pages[index] == page
                    self._publish(run, page)
                assert run.published * BLOCK <= run.computed
            case HandOff() | Release() | Starved():
                run = self.runs[command.request_id]
                assert not run.is_stage or not isinstance(command, Release) or run.is_cancelled or run.computed == run.tokens
                assert not self.is_draining or not isinstance(command, Starved) or self._is_too_large(command.request_id)
                self._close(command.request_id, command.pages)
                del self.runs[command.request_id]
                assert command.request_id not in self.ends
                self.ends[command.request_id] = type(command).__name__
            case Preempt():
                self._close(command.request_id, command.pages)
                old = self.runs[command.request_id]
                self.was_short = True
                fresh = replace(old, computed=0, has_begun=False, pages=[], lease=[], tail=None, published=0)
                self.runs[command.request_id] = fresh
                again.append(command.request_id)
            case NeedPages():
                assert self.asked is None
                assert command.count > 0
                self.asked = command.count
            case ReturnPages():
                assert not self.runs
                self._take_back(command.pages)
            case _:
                raise AssertionError(command)

    def _check_step(self, step: Step) -> None:
        assert self.step is None, "two steps at once"
        decodes = list(self.batcher.decode_chunks())
        self.chunks = [*decodes, *step.chunks]
        assert self.chunks
        assert step.batch == len(decodes)
        assert step.context_tokens == sum(chunk.start + 1 for chunk in decodes)
        assert 1 <= step.repeats <= (1 if step.chunks else self.config.max_repeats)
        assert len({chunk.request_id for chunk in self.chunks}) == len(self.chunks) <= self.config.max_batch
        assert sum(chunk.length for chunk in self.chunks) <= self.config.max_step_tokens
        for chunk in self.chunks:
            run = self.runs[chunk.request_id]
            assert run.is_prompt == (chunk in step.chunks)
            end = chunk.start + chunk.length
            reach = end + step.repeats - 1
            assert chunk.length >= 1
            assert chunk.start == run.computed
            assert chunk.length <= run.computable
            assert reach <= run.end, "the step does not stop for who ends"
            assert list(chunk.pages[: len(run.pages)]) == run.pages, "a page moved"
            run.pages = list(chunk.pages)
            run.has_begun = True
            assert len(run.pages) * BLOCK >= reach, "the step does not stop for who needs a page"
            for page in run.pages[chunk.start // BLOCK : (reach - 1) // BLOCK + 1]:
                assert page not in self.readers, "a published page is written"
                assert page in self.lent or page == run.tail
        written = [page for chunk in self.chunks for page in self.runs[chunk.request_id].private]
        assert len(written) == len(set(written)), "two sequences share a private page"

    def _check_ranks(self, step: Step) -> None:
        """Who could go before the last prompt of the step is in it, unless it lacks a page or a seat."""
        ranks = [self.runs[chunk.request_id].rank for chunk in step.chunks]
        assert ranks == sorted(ranks)
        in_step = {chunk.request_id for chunk in self.chunks}
        seats = self.config.max_batch - sum(r.has_begun and r.computable > 0 for r in self.runs.values())
        for name, run in self.runs.items():
            if ranks and run.is_prompt and run.computable > 0 and run.rank < ranks[-1] and name not in in_step:
                if run.has_begun:
                    assert run.computed == len(run.pages) * BLOCK, "a half-done prompt was passed over"
                else:
                    assert seats <= 0 or self.asked is not None or self.was_short, "a waiting prompt was passed over"

    def _publish(self, run: Run, page: int) -> None:
        if run.tail == page:
            run.tail = None
        else:
            self.lent.remove(page)
        run.lease.append(page)
        run.published += 1
        self.readers[page] = 1

    def _close(self, name: str, pages: tuple[int, ...]) -> None:
        run = self.runs[name]
        assert self.step is None or all(chunk.request_id != name for chunk in self.chunks), "released in flight"
        assert set(pages) <= run.private
        self._take_back(pages)
        for page in run.lease:
            self.readers[page] -= 1
            if not self.readers[page]:
                del self.readers[page]
                self.free.append(page)
        if run.tail is not None:
            self.free.append(run.tail)
            run.tail = None

    def _take_back(self, pages: tuple[int, ...]) -> None:
        assert set(pages) <= self.lent
        self.lent.difference_update(pages)
        self.free.extend(pages)

    def _is_too_large(self, name: str) -> bool:
        return -(-self.runs[name].total // BLOCK) > self.num_pages - 1


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
