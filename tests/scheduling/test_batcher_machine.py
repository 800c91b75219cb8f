"""The Batcher against a naive pool: no page in two places, published pages never written, everybody gets an end."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvasir.core.commands import Command, HandOff, NeedPages, Preempt, Publish, Release, ReturnPages, Starved, Step
from kvasir.core.events import Cancelled, Event, PagesGranted, StepDone, Submitted, Tick
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.chunking import BatcherConfig

BLOCK = 4


@dataclass
class Run:
    """What the naive body knows of a request."""

    tokens: int
    total: int
    hand_off: bool
    priority: int
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    lease: list[int] = field(default_factory=list)
    tail: int | None = None
    published: int = 0

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
    )
    def start(self, num_pages: int, stash: int, batch: int, step: int, ahead: int) -> None:
        self.config = BatcherConfig(
            block_tokens=BLOCK,
            max_batch=batch,
            max_step_tokens=step,
            max_mixed_tokens=8,
            ahead_tokens=ahead,
            stash_pages=stash,
            starve_s=5.0,
        )
        self.batcher = Batcher(self.config)
        self.num_pages = num_pages
        self.free = list(range(num_pages))
        self.lent: set[int] = set()  # granted to the Batcher, not given back or published
        self.readers: dict[int, int] = {}  # published page → leases on it
        self.runs: dict[str, Run] = {}
        self.step: Step | None = None
        self.asked: int | None = None
        self.now = 0.0
        self.count = 0
        self.ends: dict[str, str] = {}
        self.is_draining = False

    # --- what may happen ---

    @rule(
        prompt=st.integers(1, 60),
        output=st.integers(1, 30),
        hand_off=st.booleans(),
        priority=st.integers(0, 1),
        shared=st.integers(0, 4),
    )
    def submit(self, prompt: int, output: int, hand_off: bool, priority: int, shared: int) -> None:
        run = Run(prompt, prompt + output, hand_off, priority)
        donors = [r for r in self.runs.values() if r.published]
        if donors:
            donor = donors[shared % len(donors)]
            run.lease = donor.lease[: min(donor.published, (prompt - 1) // BLOCK, shared)]
            run.published = len(run.lease)
            run.computed = run.published * BLOCK
        self._submit(f"r{self.count}", run)

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
        self._step_done({c.request_id for c in self.step.chunks if c.samples and data.draw(st.integers(0, 7)) == 0})  # type: ignore[union-attr]

    @precondition(lambda self: self.asked is not None)
    @rule(short=st.integers(0, 3))
    def grant(self, short: int) -> None:
        assert self.asked is not None
        self._grant(0 if short == 3 else max(0, self.asked - short))

    @rule(index=st.integers(0, 20))
    def cancel(self, index: int) -> None:
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

    def teardown(self) -> None:
        """With an honest pool and a patient body, everybody comes to an end and every page comes home."""
        if not hasattr(self, "batcher"):
            return
        self.is_draining = True
        for _ in range(5000):
            if not self.runs and self.asked is None:
                break
            self.now += 0.5
            if self.step is not None:
                self._step_done(set())
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
        return Submitted(name, run.tokens, run.computed, run.total, tuple(run.pages), run.hand_off, run.priority)

    def _step_done(self, finished: set[str]) -> None:
        step, self.step = self.step, None
        assert step is not None
        for chunk in step.chunks:
            run = self.runs[chunk.request_id]
            run.computed += chunk.length
            assert chunk.samples == (run.computed == run.tokens)
            if chunk.samples and chunk.request_id not in finished and not run.hand_off:
                run.tokens += 1
        self._handle(StepDone(tuple(sorted(finished))))

    def _grant(self, count: int) -> None:
        self.asked = None
        pages, self.free = self.free[:count], self.free[count:]
        self.lent.update(pages)
        self._handle(PagesGranted(tuple(pages)))

    def _handle(self, event: Event) -> None:
        again: list[str] = []
        for command in self.batcher.handle(event, self.now):
            self._carry_out(command, again)
        for name in again:
            self._handle(self._submission(name, self.runs[name]))

    def _carry_out(self, command: Command, again: list[str]) -> None:
        match command:
            case Step():
                self._check_step(command)
                self.step = command
            case Publish():
                run = self.runs[command.request_id]
                for block in command.blocks:
                    assert block.index == run.published
                    assert run.pages[block.index] == block.page
                    self._publish(run, block.page)
                assert run.published * BLOCK <= run.computed
            case HandOff() | Release() | Starved():
                assert not self.is_draining or not isinstance(command, Starved) or self._is_too_large(command.request_id)
                self._close(command.request_id, command.pages)
                del self.runs[command.request_id]
                assert command.request_id not in self.ends
                self.ends[command.request_id] = type(command).__name__
            case Preempt():
                self._close(command.request_id, command.pages)
                old = self.runs[command.request_id]
                self.runs[command.request_id] = Run(old.tokens, old.total, old.hand_off, old.priority)
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
        assert step.chunks
        assert len({chunk.request_id for chunk in step.chunks}) == len(step.chunks) <= self.config.max_batch
        assert sum(chunk.length for chunk in step.chunks) <= self.config.max_step_tokens
        for chunk in step.chunks:
            run = self.runs[chunk.request_id]
            end = chunk.start + chunk.length
            assert chunk.length >= 1
            assert chunk.start == run.computed
            assert end <= run.tokens
            assert list(chunk.pages[: len(run.pages)]) == run.pages, "a page moved"
            run.pages = list(chunk.pages)
            assert len(run.pages) * BLOCK >= end
            for page in run.pages[chunk.start // BLOCK : (end - 1) // BLOCK + 1]:
                assert page not in self.readers, "a published page is written"
                assert page in self.lent or page == run.tail
        written = [page for chunk in step.chunks for page in self.runs[chunk.request_id].private]
        assert len(written) == len(set(written)), "two sequences share a private page"

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
        assert self.step is None or all(chunk.request_id != name for chunk in self.step.chunks), "released in flight"
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
TestBatcherMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True)
