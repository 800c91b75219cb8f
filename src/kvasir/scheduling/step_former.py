"""Forming a step: who computes how many tokens, into which pages."""

from __future__ import annotations

from kvasir.core.commands import Chunk
from kvasir.costs.model import CostModel
from kvasir.scheduling.chunking import BatcherConfig, ChunkBudget
from kvasir.scheduling.queues import Queues
from kvasir.scheduling.sequence import Sequence

STEPS_AHEAD = 2
"""Pages are asked for this many full steps of prefill ahead: one in flight, one next."""


class StepFormer:
    """Fills steps from the queues and gives sequences pages from the stash as they grow."""

    __slots__ = ("_config", "_costs", "_queues", "_stash")

    def __init__(self, config: BatcherConfig, costs: CostModel | None, queues: Queues, stash: list[int]):
        self._config = config
        self._costs = costs
        self._queues = queues
        self._stash = stash

    def form(self, *, is_short: bool, is_held: bool) -> list[Sequence]:
        """Sequences of the next step, their `in_flight` tokens set; empty when nobody can go on.

        Decode tokens first, then prompts in order of their rank. While pages are short, pages go strictly by rank and
        nobody is admitted beside running sequences.
        """
        queues, config = self._queues, self._config
        running = queues.running
        may_admit = not running or not (is_short or is_held)
        decodes = [seq for seq in running if seq.num_tokens - seq.num_computed == 1]
        prompts = [seq for seq in running if seq.num_tokens - seq.num_computed > 1] if len(decodes) < len(running) else []
        joining = queues.ready[: config.max_batch - len(running)] if may_admit else []
        budget = self._budget(decodes + joining)
        step: list[Sequence] = []
        for seq in list(running) if is_short else decodes:
            self._add(seq, budget, step)
        for seq in joining:
            if self._add(seq, budget, step):
                queues.start(seq)
        reserve = 0 if is_short else sum(self._growth(seq) for seq in decodes)
        for seq in () if is_short else prompts:
            self._add(seq, budget, step, reserve)
        while may_admit and queues.waiting and len(running) < config.max_batch:
            seq = queues.waiting[0]
            if not self._add(seq, budget, step, reserve):
                break
            queues.start(seq)
        return step

    def pages_wanted(self) -> int:
        """Pages that the next steps will need beyond the stash."""
        wanted = 0
        config, queues = self._config, self._queues
        tokens = STEPS_AHEAD * config.max_step_tokens
        prompts: list[Sequence] = []
        for seq in queues.running:
            if seq.num_tokens - seq.num_computed == 1:
                wanted += self._growth(seq)
            else:
                prompts.append(seq)
        free = config.max_batch - len(queues.running)
        for seq in queues.ready[:free]:
            wanted += self._growth(seq)
        for seq in (*prompts, *queues.waiting[:free]):
            if tokens <= 0:
                break
            ahead = min(seq.remaining, seq.in_flight + tokens)
            wanted += seq.pages_for(seq.num_computed + ahead + config.ahead_tokens, config.block_tokens)
            tokens -= ahead
        return wanted - len(self._stash)

    def _budget(self, decodes: list[Sequence]) -> ChunkBudget:
        context = sum(seq.num_tokens for seq in decodes) if self._costs else 0
        return ChunkBudget(self._config, self._costs, batch=len(decodes), context_tokens=context)

    def _growth(self, seq: Sequence) -> int:
        """Pages that a decoding sequence will need soon."""
        reach = seq.num_computed + seq.in_flight + self._config.ahead_tokens
        if reach <= len(seq.pages) * self._config.block_tokens:
            return 0
        return seq.pages_for(reach, self._config.block_tokens)

    def _add(self, seq: Sequence, budget: ChunkBudget, step: list[Sequence], reserve: int = 0) -> bool:
        """Put as much of `seq` into the step as tokens and pages allow, leaving `reserve` pages to others."""
        block_tokens = self._config.block_tokens
        is_prompt = seq.num_tokens - seq.num_computed > 1
        length = budget.chunk(seq.remaining, seq.num_computed) if is_prompt else 1
        missing = -(-(seq.num_computed + length) // block_tokens) - len(seq.pages)
        if missing > 0 < length:
            taken = self._take(min(missing, max(0, len(self._stash) - reserve)))
            seq.pages += taken
            length = min(length, len(seq.pages) * block_tokens - seq.num_computed)
        if length <= 0:
            return False
        if is_prompt:
            budget.spend(length, seq.num_computed)
        seq.in_flight = length
        step.append(seq)
        return True

    def _take(self, count: int) -> tuple[int, ...]:
        if not count:
            return ()
        taken = tuple(self._stash[-count:])
        del self._stash[-count:]
        return taken


def chunk_of(seq: Sequence) -> Chunk:
    """What the engine is told of a sequence in flight."""
    end = seq.num_computed + seq.in_flight
    return Chunk(seq.id, seq.num_computed, seq.in_flight, seq.pages, samples=end == seq.num_tokens)
