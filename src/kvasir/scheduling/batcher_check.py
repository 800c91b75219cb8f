"""The invariants of a Batcher, both ways."""

from __future__ import annotations

from collections import Counter

from kvasir.core.batcher_commands import Step
from kvasir.core.errors import InvariantError
from kvasir.scheduling.chunking import BatcherConfig
from kvasir.scheduling.decode_set import DecodeSet
from kvasir.scheduling.queues import Queues
from kvasir.scheduling.sequence import Sequence, rank_of


def check_decodes(decodes: DecodeSet, config: BatcherConfig) -> None:
    """Settles all members, so that the other checks see how far they are."""
    context_tokens = growth = 0
    for seq in decodes:
        decodes.settle(seq)
        context_tokens += seq.num_tokens
        growth += seq.pages_for(seq.num_tokens + config.ahead_tokens, config.block_tokens)
        if not seq.has_begun or not seq.is_decoding or seq.num_tokens > len(seq.pages) * config.block_tokens:
            raise InvariantError(f"{seq.id} decodes without a page or with more than a token to compute")
    if (context_tokens, growth) != (decodes.context_tokens, decodes.growth):
        raise InvariantError(
            f"decodes: {decodes.context_tokens} tokens and {decodes.growth} pages, not {context_tokens}, {growth}"
        )
    if len(decodes) and decodes.passes_until_due() < 1:
        raise InvariantError("somebody is due and was not looked after")


def check_pages(queues: Queues, stash: list[int], block_tokens: int) -> None:
    """A page is in the stash, private to one sequence, or leased; only leased pages may be shared."""
    private = Counter(stash)
    leased: set[int] = set()
    for seq in queues:
        private.update(seq.private)
        leased.update(seq.pages[: seq.num_leased])
        _check_sequence(seq, block_tokens)
    twice = sorted(page for page, count in private.items() if count > 1 or page in leased)
    if twice:
        raise InvariantError(f"pages in two places: {twice}")


def check_queues(queues: Queues) -> None:
    """Each sequence is in exactly one place, where it belongs, and each queue is sorted."""
    listed = [*queues.decodes, *(seq for queue in queues.lists for seq in queue)]
    if sorted(seq.id for seq in listed) != sorted(seq.id for seq in queues):
        raise InvariantError(f"queues list {sorted(seq.id for seq in listed)}, known are {sorted(seq.id for seq in queues)}")
    for queue in queues.lists:
        if queue != sorted(queue, key=rank_of):
            raise InvariantError(f"queue out of order: {[seq.id for seq in queue]}")
        for seq in queue:
            before = seq.home
            queues.place(seq)
            if seq.home is not before or before is not queue:
                raise InvariantError(f"{seq.id} was in the wrong queue")


def check_step(step: Step | None, prompts: list[Sequence], queues: Queues, max_batch: int) -> None:
    """In flight are the decodes and the step's prompts, in all at most `max_batch`; without a step nobody."""
    if {seq.id for seq in queues if seq.in_flight} != {seq.id for seq in prompts}:
        raise InvariantError(f"the step's prompts are {[seq.id for seq in prompts]}, not so by their own account")
    if not all(seq.has_begun for seq in prompts):
        raise InvariantError(f"in flight and not begun: {[seq.id for seq in prompts if not seq.has_begun]}")
    batch = len(queues.decodes) + len(prompts)
    if batch > max_batch:
        raise InvariantError(f"{batch} are in flight, at most {max_batch} may")
    if (step is None) != (batch == 0):
        raise InvariantError(f"{batch} sequences in flight, and {'no' if step is None else 'a'} step")


def _check_sequence(seq: Sequence, block_tokens: int) -> None:
    reach = seq.num_computed + seq.in_flight
    if not 0 <= seq.num_computed < seq.num_tokens < seq.max_total_tokens or reach > seq.num_tokens:
        raise InvariantError(f"{seq.id}: computed {seq.num_computed} + {seq.in_flight} of {seq.num_tokens} tokens")
    if seq.in_flight > max(0, seq.computable):
        raise InvariantError(f"{seq.id}: computes {seq.in_flight} tokens, {seq.computable} are available")
    if reach > len(seq.pages) * block_tokens:
        raise InvariantError(f"{seq.id}: {len(seq.pages)} pages do not hold {reach} tokens")
    if not seq.num_full <= seq.num_computed // block_tokens <= len(seq.pages) or not seq.num_full <= seq.num_leased <= len(
        seq.pages
    ):
        raise InvariantError(f"{seq.id}: {seq.num_full} full and {seq.num_leased} leased of {len(seq.pages)} pages")
    if not seq.is_stage and seq.num_full != seq.num_computed // block_tokens:
        raise InvariantError(f"{seq.id}: {seq.num_full} full pages for {seq.num_computed} tokens")
