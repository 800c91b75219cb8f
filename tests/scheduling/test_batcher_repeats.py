"""Steps that repeat change nothing: the same happens to every sequence at the same virtual time as with one step a pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from heapq import heappop, heappush

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvasir.core.batcher_commands import Chunk, HandOff, NeedPages, Preempt, Publish, Release, ReturnPages, Starved, Step
from kvasir.core.events import Cancelled, Event, Extended, PagesGranted, StepDone, Submitted, Tick
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.chunking import BatcherConfig

BLOCK = 8
TICK = 64
COSTS = FittedCost(PrefillFit(0.0, 1.0, 0, 0), DecodeFit(3.0, 1.0, 0.0), 0.0, 1e9)


@dataclass(frozen=True)
class Job:
    """A request; `adopted` comes with its prompt's KV, `gap` is between the stages of a pipeline (0: none)."""

    at: int
    prompt: int
    output: int
    adopted: bool
    hand_off: bool
    deadline: int
    gap: int
    is_stage: bool
    cancel_after: int | None


@dataclass
class Sim:
    """One instance and its pages under a clock of whole units: a pass takes 3, and 1 for each token."""

    jobs: list[Job]
    num_pages: int
    max_repeats: int
    is_ranked: bool
    now: int = 0
    num_events: int = 0
    log: list[tuple[int, str, str, int]] = field(default_factory=list)
    computed: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = BatcherConfig(
            block_tokens=BLOCK,
            max_batch=5,
            max_step_tokens=48,
            max_mixed_tokens=32,
            max_step_s=20.0,
            min_chunk_tokens=0,
            ahead_tokens=3,
            stash_pages=4,
            starve_s=200.0,
            max_repeats=self.max_repeats,
        )
        self.batcher = Batcher(config, COSTS)
        self.free = list(range(self.num_pages))
        self.leases: dict[str, list[int]] = {}
        self.known: dict[str, Submitted] = {}
        self.step: Step | None = None
        self.chunks: list[Chunk] = []
        self.passes = 0  # of the step, begun
        self.pass_ends = 0
        self.is_cut = False
        self.todo: list[tuple[int, int, Event]] = []

    def run(self) -> None:
        for number, job in enumerate(self.jobs):
            self._plan(f"r{number}", job)
        while self.todo or self.known:
            next_event = self.todo[0][0] if self.todo else math.inf
            if self.step is None:
                tick = (self.now // TICK + 1) * TICK
                if next_event <= tick:
                    self._external()
                else:
                    self.now = tick
                    self._handle(Tick())
            elif next_event <= self.pass_ends:
                self._external()
            else:
                self._end_pass(self.step)
            self.batcher.check()
        assert self.batcher.load().free_kv_tokens == (self.num_pages - len(self.free)) * BLOCK

    def _rank(self, job: Job) -> float | None:
        return float(job.deadline) if self.is_ranked else None

    def _plan(self, name: str, job: Job) -> None:
        total = job.prompt + job.output
        if job.adopted and job.output > 1:
            event = Submitted(name, job.prompt + 1, job.prompt, total, (), rank=self._rank(job))
        else:
            available = job.prompt // 3 if job.gap else None
            hand_off, is_stage = job.hand_off and not job.is_stage, job.is_stage
            event = Submitted(name, job.prompt, 0, total, (), hand_off, 0, self._rank(job), 0.5, available, is_stage)
            if job.gap:
                self._later(job.at + job.gap, Extended(name, job.prompt // 2))
                self._later(job.at + 2 * job.gap, Extended(name, job.prompt))
        self._later(job.at, event)
        if job.cancel_after is not None:
            self._later(job.at + job.cancel_after, Cancelled(name))

    def _later(self, at: int, event: Event) -> None:
        heappush(self.todo, (at, len(self.todo) + 1000 * at + self.num_events, event))
        self.num_events += 1

    def _external(self) -> None:
        at, _, event = heappop(self.todo)
        self.now = max(self.now, at)
        match event:
            case Submitted(request_id=name, num_computed=computed):
                count = -(-computed // BLOCK)
                if count > len(self.free):
                    return
                pages, self.free = self.free[:count], self.free[count:]
                self.leases[name] = pages
                self.computed[name] = 0
                event = self._with(event, pages=tuple(pages))
                self.known[name] = event
            case Extended(request_id=name, available=available):
                if name not in self.known or self.known[name].available is None:
                    return
                self.known[name] = self._with(self.known[name], available=available)
        self.is_cut = True
        self._handle(event)

    def _end_pass(self, step: Step) -> None:
        self.now = self.pass_ends
        for chunk in self.chunks:
            self.computed[chunk.request_id] += chunk.length
        if self.passes < step.repeats and not self.is_cut:
            self.passes += 1
            self._start_pass()
            return
        self.step = None
        self._handle(StepDone(steps=self.passes))

    def _start_pass(self) -> None:
        self.pass_ends = self.now + 3 + sum(chunk.length for chunk in self.chunks)

    def _handle(self, event: Event) -> None:
        self.num_events += 1
        again: list[Submitted] = []
        for command in self.batcher.handle(event, float(self.now)):
            match command:
                case Step():
                    self.step, self.passes, self.is_cut = command, 1, False
                    self.chunks = [*self.batcher.decode_chunks(), *command.chunks]
                    self._start_pass()
                case Publish(request_id=name, first=first, pages=pages):
                    self.leases[name] += [page for page in pages if page not in self.leases[name]]
                    for index in range(first, first + len(pages)):
                        self.log.append((self.now, "Publish", name, index))
                case Release(request_id=name, pages=pages) | HandOff(request_id=name, pages=pages):
                    self._close(type(command).__name__, name, pages)
                    del self.known[name]
                case Starved(request_id=name, pages=pages):
                    self._close("Starved", name, pages)
                    del self.known[name]
                case Preempt(request_id=name, pages=pages):
                    self._close("Preempt", name, pages)
                    self.leases[name] = []
                    old = self.known[name]
                    available = old.available if old.available is not None and old.available < old.num_tokens else None
                    again.append(self._with(old, num_computed=0, pages=(), available=available))
                case NeedPages(count=count):
                    pages, self.free = tuple(self.free[:count]), self.free[count:]
                    if pages:
                        self.is_cut = True
                    self._handle(PagesGranted(pages))
                case ReturnPages(pages=pages):
                    self.free.extend(pages)
        for submission in again:
            self.known[submission.request_id] = submission
            self._handle(submission)

    def _close(self, kind: str, name: str, pages: tuple[int, ...]) -> None:
        self.log.append((self.now, kind, name, self.computed[name]))
        self.free.extend(pages)
        self.free.extend(self.leases.pop(name))
        self.free.sort()

    def _with(self, event: Submitted, **changes: object) -> Submitted:
        return replace(event, **changes)


jobs = st.builds(
    Job,
    at=st.integers(0, 600),
    prompt=st.integers(1, 90),
    output=st.integers(1, 60),
    adopted=st.booleans(),
    hand_off=st.booleans(),
    deadline=st.integers(0, 900),
    gap=st.sampled_from([0, 0, 0, 7, 40]),
    is_stage=st.booleans(),
    cancel_after=st.none() | st.integers(0, 400),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    jobs=st.lists(jobs, min_size=1, max_size=14),
    num_pages=st.sampled_from([30, 45, 400]),
    is_ranked=st.booleans(),
)
def test_repeated_steps_change_nothing_but_the_number_of_events(jobs: list[Job], num_pages: int, is_ranked: bool) -> None:
    single, repeated = (Sim(jobs, num_pages, max_repeats, is_ranked) for max_repeats in (1, 1000))
    single.run()
    repeated.run()
    assert repeated.log == single.log
    assert repeated.computed == single.computed
    assert repeated.num_events <= single.num_events


def test_a_long_answer_takes_few_events() -> None:
    job = Job(0, 20, 800, adopted=True, hand_off=False, deadline=0, gap=0, is_stage=False, cancel_after=None)
    sim = Sim([job], 400, 1000, is_ranked=False)
    sim.run()
    assert sim.computed == {"r0": 799}
    assert sim.num_events < 2.5 * 800 / BLOCK + 50
