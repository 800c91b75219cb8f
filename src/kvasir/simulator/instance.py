"""One instance in virtual time: carries its Batcher's commands out, as cluster/instance.py does, on predicted seconds.

A step takes the sum of its prefill chunks, one after another, each times the share of the layers that it computes, and
of its decode batch. Passes of a repeated decode step grow with their contexts, by the first and the last pass; their
gaps are logged as equal. The instance is idle between steps; no token is computed.
"""

from __future__ import annotations

import math
from typing import Final

from mypy_extensions import mypyc_attr

from kvasir.core.batcher_commands import (
    BatcherCommand,
    HandOff,
    NeedPages,
    Preempt,
    Publish,
    Release,
    ReturnPages,
    Starved,
    Step,
)
from kvasir.core.events import InstanceInfo, InstanceLoad
from kvasir.core.request import Role
from kvasir.costs.quick import QuickCosts
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.sequence import Sequence
from kvasir.simulator.agenda import Agenda, Planned
from kvasir.simulator.cores import Cores
from kvasir.simulator.decoding import Decoding
from kvasir.simulator.gaps import Gaps
from kvasir.simulator.jobs import Seq
from kvasir.simulator.listener import Listener
from kvasir.simulator.memory import Memory
from kvasir.simulator.node import SimNode
from kvasir.simulator.noise import Noise

OFFER_S: Final = 30.0
"""How long a handed-off prompt waits in the pool for the instance that decodes it, as live."""


class SimInstance:
    """Runs from its start to the end of the simulation, or until `die`."""

    def __init__(
        self,
        info: InstanceInfo,
        node: SimNode,
        batcher: Batcher,
        memory: Memory,
        *,
        agenda: Agenda,
        costs: QuickCosts,
        listener: Listener,
        block_tokens: int,
        max_gap_s: float,
        cores: Cores | None = None,
        noise: Noise | None = None,
    ):
        """`cores`: what it computes on together with the other instances of its node; None where it has its own device.

        With `noise` no step takes exactly what it costs.
        """
        self.info = info
        self.id: str = info.id
        self.epoch: int = info.epoch
        self.node = node
        self.batcher = batcher
        self.memory = memory
        self.sequences: dict[str, Seq] = {}
        self.busy_s = 0.0
        self.prefill_s = 0.0
        self.decode_batch = 0
        self.was_idle = True
        self.is_up = True
        self._agenda = agenda
        self._costs = costs
        self._listener = listener
        self._block_tokens = block_tokens
        self._max_gap_s = max_gap_s
        self._cores = cores
        self._noise = noise
        self._is_low = info.role is Role.PREFILL  # for good: a process keeps its priority when its role changes
        self._pauses = False
        self._resumes_s = 0.0
        self._parked: dict[str, Seq] = {}  # preempted: they hold nothing until somebody leaves
        self._absent: dict[Seq, None] = {}  # here, but not with the Batcher
        self._waiting: list[Seq] = []  # their KV is on the node, and no pages for it are free
        self._granted: tuple[int, ...] | None = None  # pages that the Batcher is yet to be told of
        self._num_left = 0
        self._told: list[Seq] = []
        self._ended: list[Seq] = []
        self._handed: list[Seq] = []
        self._decoding = Decoding(lambda: {chunk.request_id for chunk in batcher.decode_chunks()})
        self._singles: list[Seq] = []
        self._prompts: list[Seq] = []  # in the step, too
        self._step: Step | None = None
        self._number = 0  # of the step; what is planned for an earlier one is void
        self._passes = 1
        self._repeats = 1
        self._start_s = 0.0
        self._first_s = 0.0
        self._growth_s = 0.0

    # --- what the hub wants ------------------------------------------------------------------------------------

    def expect(self, seq: Seq) -> None:
        """The sequence is coming; its KV is not in place yet."""
        self.sequences[seq.name] = seq
        self._absent[seq] = None

    def submit(self, seq: Seq) -> None:
        """The KV of its first `prefix_tokens` is on this node: give it to the Batcher as soon as there are pages."""
        if seq.is_cancelled or self.sequences.get(seq.name) is not seq:
            return
        self._waiting.append(seq)
        self._serve_waiting()

    def cancel(self, seq: Seq) -> None:
        """Stop; what is in a step is released after it."""
        if self.sequences.get(seq.name) is not seq:
            return
        seq.is_cancelled = True
        if seq.is_submitted:
            self._cut_short()
            self._carry_out(self.batcher.cancel(seq.name, self._agenda.now))
            return
        if seq in self._waiting:
            self._waiting.remove(seq)
        self.memory.release(seq, ())
        self._forget(seq)
        self._settle()

    def extend(self, seq: Seq, tokens: int) -> None:
        """The stage before has computed the first `tokens`."""
        if seq.is_cancelled or self.sequences.get(seq.name) is not seq:
            return
        seq.available = tokens
        if tokens == seq.num_tokens and seq.stage is None:
            self.memory.take_over(seq)
        if seq.is_submitted:
            self._cut_short()
            self._carry_out(self.batcher.extend(seq.name, tokens, self._agenda.now))

    def pace(self, pauses: bool) -> None:
        """Pause after each step for as long as it took, as long as a token still comes every `max_gap_s`; or do not."""
        self._pauses = pauses
        if self._step is not None:
            self._cut()

    def tick(self) -> None:
        """Time passed; of interest to a Batcher that has work and no step, or too few pages."""
        if self.sequences and (self._step is None or self.batcher.is_short):
            self._cut_short()
            self._carry_out(self.batcher.tick(self._agenda.now))

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens to compute, with those of prompts that wait for their KV or for pages."""
        tokens = self.batcher.waiting_tokens
        for seq in self._coming():
            tokens += seq.num_tokens - seq.prefix_tokens
        return tokens

    def load(self) -> InstanceLoad:
        """The queues now, with what waits for its KV or for pages, and what the pool could give."""
        coming = self._coming()
        tokens, free_tokens = sum([seq.num_tokens - seq.prefix_tokens for seq in coming]), self.memory.free_tokens
        return self.batcher.load(waiting=len(coming), waiting_tokens=tokens, free_kv_tokens=free_tokens)

    def _coming(self) -> list[Seq]:
        """Prompts that the Batcher does not know yet."""
        return [seq for seq in self._absent if not seq.is_adopted and not seq.is_cancelled]

    @property
    def is_idle(self) -> bool:
        return not self.sequences

    @property
    def is_computing(self) -> bool:
        return self._step is not None

    def die(self) -> None:
        """The process is gone: passes that were complete have reached the client, nothing else happens here."""
        self.is_up = False
        self._number += 1
        if self._step is not None:
            passes = self._passes_by(self._agenda.now, whole=False)
            if self._step.batch and passes:
                seconds = self._lasts_s(passes)
                self._decoding.end(passes, seconds, self._start_s + seconds)
            self.busy_s += max(0.0, self._agenda.now - self._start_s)
            self._step = None
        if self._cores is not None:
            self._cores.stop(self.id)
        self._decoding.close()
        self.decode_batch = 0
        self.sequences.clear()
        self.memory.lose()

    # --- sequences and pages -----------------------------------------------------------------------------------

    def _take_pages(self, seq: Seq) -> tuple[int, ...] | None:
        if seq.is_adopted:
            return self.memory.adopt(seq, seq.prefix_tokens, is_local=seq.attempt.offered is self.node)
        return self.memory.place(seq, seq.prefix_tokens)

    def _submit(self, seq: Seq, pages: tuple[int, ...]) -> None:
        del self._absent[seq]
        seq.is_submitted = True
        if seq.is_adopted:
            self._decoding.add(seq)
            seq.attempt.offered = None
        elif seq.num_tokens - seq.prefix_tokens == 1 and seq.stage is None:
            self._decoding.add_single(seq)
        sequence = Sequence(
            seq.name,
            num_tokens=seq.num_tokens,
            num_computed=seq.prefix_tokens,
            max_total_tokens=seq.job.total_tokens,
            pages=pages,
            hand_off=seq.hands_off,
            share=seq.share,
            available=seq.available,
            is_stage=seq.stage is not None,
        )
        self._cut_short()
        self._carry_out(self.batcher.submit(sequence, self._agenda.now, rank=seq.rank))

    def _serve_waiting(self) -> None:
        """In order of arrival, as far as there are pages. Nobody here to free any: the first can never run."""
        while self._waiting:
            pages = self._take_pages(self._waiting[0])
            if pages is not None:
                self._submit(self._waiting.pop(0), pages)
            elif len(self.sequences) == len(self._absent) and self._step is None:
                self._give_up(self._waiting.pop(0), "its KV does not fit into this instance")
            else:
                return

    def _give_up(self, seq: Seq, error: str, pages: tuple[int, ...] = ()) -> None:
        self.memory.release(seq, pages)
        self._forget(seq)
        self._listener.failed(seq, error)

    def _forget(self, seq: Seq) -> None:
        """It has left; who was preempted longest ago may come back."""
        del self.sequences[seq.name]
        if seq in self._absent:
            del self._absent[seq]
        if seq.name in self._parked:
            del self._parked[seq.name]
        self._decoding.remove(seq)
        self._num_left += 1

    def _settle(self) -> None:
        """After commands: pages may be free, and who was preempted longest ago may come back."""
        if self._waiting:
            self._serve_waiting()
        num_left, self._num_left = self._num_left, 0
        while num_left and self._parked:
            num_left -= 1
            name, seq = next(iter(self._parked.items()))
            del self._parked[name]
            self._readmit(seq)

    def _readmit(self, seq: Seq) -> None:
        """What was preempted is computed again from its tokens so far."""
        seq.num_tokens = seq.job.known_tokens
        seq.prefix_tokens = self.memory.open(seq) * self._block_tokens
        self.submit(seq)

    def _preempt(self, command: Preempt) -> None:
        seq = self.sequences[command.request_id]
        if self.memory.is_shared(seq):  # the other stages would have to start anew, too
            self._give_up(seq, "a pipeline was stopped for lack of KVCache blocks", command.pages)
            return
        self.memory.release(seq, command.pages)
        self._decoding.remove(seq)
        seq.is_submitted = seq.is_adopted = False
        seq.num_tokens, seq.prefix_tokens = seq.job.known_tokens, 0
        self._absent[seq] = None
        self._parked[seq.name] = seq

    # --- what the Batcher wants --------------------------------------------------------------------------------

    def _carry_out(self, commands: list[BatcherCommand]) -> None:
        """All that it says, then what it says to the pages that it asked for."""
        self._do(commands)
        while self._granted is not None:
            pages, self._granted = self._granted, None
            self._cut_short()
            self._do(self.batcher.grant(pages, self._agenda.now))
        if self._told or self._handed or self._ended:
            self._tell()
        if self._waiting or self._parked:
            self._settle()
        else:
            self._num_left = 0

    def _do(self, commands: list[BatcherCommand]) -> None:
        for command in commands:
            match command:
                case Step():
                    self._begin(command)
                case Publish():
                    self.memory.publish(self.sequences[command.request_id], command.first, command.pages)
                case NeedPages():
                    self._granted = self.memory.reserve(command.count)
                case Release():
                    self._release(command)
                case HandOff():
                    self._hand_off(command)
                case ReturnPages():
                    self.memory.revoke(command.pages)
                case Preempt():
                    self._preempt(command)
                case Starved():
                    self._starved(command)
                case _:
                    raise AssertionError(f"the Batcher said {command!r}")

    def _hand_off(self, command: HandOff) -> None:
        seq = self.sequences[command.request_id]
        self.memory.offer(seq, command.pages, self._agenda.now + OFFER_S)
        self._forget(seq)
        self._handed.append(seq)

    def _starved(self, command: Starved) -> None:
        error = f"no KVCache block became free for {command.waited_s:.0f} s"
        self._give_up(self.sequences[command.request_id], error, command.pages)

    def _release(self, command: Release) -> None:
        seq = self.sequences[command.request_id]
        self.memory.release(seq, command.pages)
        self._forget(seq)
        if not seq.is_cancelled and seq.stage is None:
            self._ended.append(seq)

    def _tell(self) -> None:
        """First the tokens, then the hand-offs, as live."""
        told, ended, handed = self._told, self._ended, self._handed
        self._told, self._ended, self._handed = [], [], []
        for seq in ended:
            self._listener.finished(seq)
        for seq in told:
            if seq.is_decoding and not seq.is_cancelled:
                self._listener.first_token(seq)
        for seq in handed:
            self._listener.handed_off(seq)

    # --- steps -------------------------------------------------------------------------------------------------

    def _begin(self, step: Step) -> None:
        now = self._agenda.now
        if now < self._resumes_s:
            now = self._resumes_s
        costs, batch, repeats = self._costs, step.batch, step.repeats
        self._step, self._start_s, self._repeats = step, now, repeats
        self._passes = repeats if self._cores is None and not self._pauses else 1
        self._number += 1
        seconds = 0.0
        for chunk in step.chunks:
            seq = self.sequences[chunk.request_id]
            start, length = chunk.start, chunk.length
            seconds += costs.prefill_s(length, start) * seq.share
            seq.computed, seq.samples = start + length, chunk.samples
            self._prompts.append(seq)
            if not seq.is_started:
                self._started(seq)
        self.prefill_s += seconds
        self.decode_batch = batch
        if batch:
            self._singles = singles = self._decoding.begin(batch, now)
            for seq in singles:
                self._passes = 1
                if not seq.is_started:
                    self._started(seq)
            context_tokens = step.context_tokens
            pass_s = costs.decode_step_s(batch, context_tokens)
            if self._passes > 1:
                reach = context_tokens + batch * (repeats - 1)
                self._growth_s = (costs.decode_step_s(batch, reach) - pass_s) / (repeats - 1)
            else:
                self._growth_s = 0.0
            seconds += pass_s
        if self._noise is not None:
            factor = self._noise.draw()
            seconds *= factor
            if batch:
                self._growth_s *= factor
        self._first_s = seconds
        if self._cores is None:
            passes = self._passes
            lasts_s = seconds if passes == 1 else self._lasts_s(passes)
            self._agenda.plan(now + lasts_s, _StepEnd(self, self._number))
        else:
            self._agenda.at(now, self._compute, self._number)

    def _compute(self, number: int) -> None:
        """The step begins on cores that others use, too."""
        if number == self._number:
            assert self._cores is not None, "a device of its own needs no turn"
            self._cores.run(self.id, self._first_s, is_low=self._is_low, then=self.end, argument=number)

    def _started(self, seq: Seq) -> None:
        seq.is_started = True
        self._listener.prefill_started(seq)

    def _lasts_s(self, passes: int) -> float:
        """What so many passes of the present step take."""
        return passes * self._first_s + 0.5 * passes * (passes - 1) * self._growth_s

    def _passes_by(self, now: float, *, whole: bool) -> int:
        """Passes of the present step that began (or, with `whole` false, ended) by now."""
        elapsed_s, first_s, growth_s = max(0.0, now - self._start_s), self._first_s, self._growth_s
        half = first_s - 0.5 * growth_s
        if growth_s > 0:
            passes = (math.sqrt(half * half + 2.0 * growth_s * elapsed_s) - half) / growth_s
        else:
            passes = elapsed_s / first_s if first_s else 0.0
        return max(1, math.ceil(passes - 1e-9)) if whole else min(self._passes, math.floor(passes + 1e-9))

    def _cut_short(self) -> None:
        """The Batcher is about to be told something that the next pass should know."""
        if self._repeats > 1 and self._step is not None:
            self._cut()

    def _cut(self) -> None:
        """End the step with the pass in flight."""
        passes = self._passes_by(self._agenda.now, whole=True)
        if passes < self._passes:
            self._passes = passes
            self._number += 1
            self._agenda.plan(self._start_s + self._lasts_s(passes), _StepEnd(self, self._number))

    def end(self, number: int) -> None:
        """Step `number` has taken its time, unless it was cut short."""
        if number != self._number:
            return
        step = self._step
        assert step is not None, "a step that ends is under way"
        now, passes = self._agenda.now, self._passes
        self.busy_s += now - self._start_s
        self._step = None
        if self.decode_batch:
            self._decoding.end(passes, now - self._start_s, now)
        if self._pauses:
            seconds = now - self._start_s if passes == 1 else self._first_s + (passes - 1) * self._growth_s
            self._resumes_s = now + max(0.0, min(seconds, self._max_gap_s - seconds))
        self._computed(now)
        self._carry_out(self.batcher.step_done(passes, now))

    def _computed(self, now: float) -> None:
        """Note the tokens that chunks gave; those of sequences that stay here are to be told to the hub."""
        if self._singles:
            singles, self._singles = self._singles, []
            for seq in singles:
                self._sampled(seq, now)
        if self._prompts:
            prompts, self._prompts = self._prompts, []
            for seq in prompts:
                if seq.stage is not None:
                    self._listener.stage_computed(seq, seq.computed)
                elif seq.samples:
                    self._sampled(seq, now)
                elif seq.computed == seq.num_tokens - 1:
                    self._decoding.add_single(seq)

    def _sampled(self, seq: Seq, now: float) -> None:
        """The prompt, or all tokens so far, is computed, and the next one drawn."""
        job = seq.job
        if seq.is_cancelled:
            return
        if job.emitted:
            job.gaps.append(Gaps(now - job.last_token_s, 1))
        else:
            job.first_token_s = now
        job.emitted += 1
        job.last_token_s = now
        if not seq.hands_off and job.emitted < job.output_tokens:
            self._decoding.add(seq)
            self._told.append(seq)


@mypyc_attr(acyclic=True)
class _StepEnd(Planned):
    __slots__ = ("instance", "number")

    def __init__(self, instance: SimInstance, number: int):
        super().__init__()
        self.instance = instance
        self.number = number

    def happen(self) -> None:
        self.instance.end(self.number)
