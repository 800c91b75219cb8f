"""Forming a step: who computes how many tokens, into which pages."""

from __future__ import annotations

from typing import Final

from kvasir.core.batcher_commands import Chunk
from kvasir.costs.quick import QuickCosts
from kvasir.scheduling.chunking import BatcherConfig, ChunkBudget
from kvasir.scheduling.queues import Queues
from kvasir.scheduling.sequence import Sequence, rank_of

STEPS_AHEAD: Final = 2
"""Pages are asked for this many full steps of prefill ahead: one in flight, one next."""


class StepFormer:
    """Fills steps from the queues and gives sequences pages from the stash as they grow."""

    __slots__ = ("_config", "_costs", "_queues", "_stash", "puts_off")

    def __init__(self, config: BatcherConfig, costs: QuickCosts | None, queues: Queues, stash: list[int]):
        self._config = config
        self._costs = costs
        self._queues = queues
        self._stash = stash
        self.puts_off = False

    def form(self, *, is_short: bool, is_held: bool) -> list[Sequence]:
        """The next step: decodes whoever has the page for it; returns the prompts in it, their `in_flight` tokens set.

        Decode tokens first, then prompts in order of their rank, begun or not. While pages are short, pages go strictly by
        rank. While they are short or `is_held`, nobody is admitted beside running sequences. Who joins the decodes has waited
        for a step already, so where steps are to be short its first one `puts_off` the prompts.
        """
        queues, max_batch = self._queues, self._config.max_batch
        if queues.has_only_decodes:
            self.puts_off = False
            return []
        paused, decodes = queues.paused, queues.decodes
        num_running = queues.num_running
        is_running = num_running > 0
        seats = 0 if is_running and (is_short or is_held) else max_batch - num_running
        joining = queues.ready[:seats] if seats > 0 else []
        prompts = queues.prompts(seats)
        self.puts_off = bool(prompts and joining and self._config.max_step_s is not None)
        decoding = paused + joining
        if not prompts or self.puts_off:
            for seq in decoding:
                self._decode(seq, beside=0)
            return []
        budget = self._budget(decoding)
        in_order = sorted(paused + prompts, key=rank_of) if is_short and is_running else decoding + prompts
        step: list[Sequence] = []
        members = decodes.members
        is_blocked = False  # for pages; who waits behind does not overtake
        for seq in in_order:
            if seq.is_decoding:
                self._decode(seq, beside=len(step))
                continue
            if len(members) + len(step) >= max_batch or (not seq.has_begun and (is_blocked or queues.num_running >= max_batch)):
                continue
            length = budget.chunk(seq.computable, seq.num_computed, seq.share)
            if length <= 0:
                if is_short:
                    continue  # decodes may follow
                break
            length = self._fit(seq, length, reserve=0 if is_short else decodes.growth)
            if length <= 0:
                is_blocked = True
                continue
            budget.spend(length, seq.num_computed, seq.share)
            seq.in_flight = length
            step.append(seq)
            if not seq.has_begun:
                queues.begin(seq)
        return step

    def pages_wanted(self) -> int:
        """Pages that the next steps will need beyond the stash."""
        config, queues = self._config, self._queues
        wanted = queues.decodes.growth
        if queues.has_only_decodes:
            return wanted - len(self._stash)
        seats = config.max_batch - queues.num_running
        if queues.paused or queues.ready:
            for seq in (*queues.paused, *(queues.ready[:seats] if seats > 0 else ())):
                wanted += seq.pages_for(seq.num_computed + 1 + config.ahead_tokens, config.block_tokens)
        tokens = STEPS_AHEAD * config.max_step_tokens
        for seq in queues.prompts(seats):
            if tokens <= 0:
                break
            ahead = min(seq.computable, seq.in_flight + tokens)
            wanted += seq.pages_for(seq.num_computed + ahead + config.ahead_tokens, config.block_tokens)
            tokens -= ahead
        return wanted - len(self._stash)

    def _budget(self, joining: list[Sequence]) -> ChunkBudget:
        decodes = self._queues.decodes
        context = decodes.context_tokens
        if joining:
            context += sum([seq.num_tokens for seq in joining])
        idle = self._queues.idle
        share = min([seq.share for seq in idle]) if idle else 1.0
        batch = len(decodes) + len(joining)
        return ChunkBudget(self._config, self._costs, batch=batch, context_tokens=context, share=share)

    def _decode(self, seq: Sequence, beside: int) -> None:
        """Into the batch, which has `beside` prompts, if there is a seat and a page."""
        if len(self._queues.decodes) + beside < self._config.max_batch and self._fit(seq, 1, reserve=0):
            self._queues.decode(seq)

    def _fit(self, seq: Sequence, length: int, reserve: int) -> int:
        """How many of the next `length` tokens have pages, taken from the stash but for `reserve` of them."""
        block_tokens, stash = self._config.block_tokens, self._stash
        missing = -(-(seq.num_computed + length) // block_tokens) - len(seq.pages)
        if missing <= 0:
            return length
        count = min(missing, len(stash) - reserve)
        if count > 0:
            seq.pages += tuple(stash[-count:])
            del stash[-count:]
        return min(length, len(seq.pages) * block_tokens - seq.num_computed)


def chunk_of(seq: Sequence) -> Chunk:
    """What the engine is told of a prompt in flight."""
    end = seq.num_computed + seq.in_flight
    samples = end == seq.num_tokens and not seq.is_stage
    return Chunk(seq.id, seq.num_computed, seq.in_flight, seq.pages, samples, seq.share)
