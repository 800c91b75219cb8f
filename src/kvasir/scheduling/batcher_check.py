"""The invariants of a Batcher, both ways."""

from __future__ import annotations

from collections import Counter

from kvasir.core.errors import InvariantError
from kvasir.scheduling.queues import Queues
from kvasir.scheduling.sequence import Sequence


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


def check_queues(queues: Queues, flying: list[Sequence], max_batch: int) -> None:
    """Each sequence is in exactly one queue, each queue is sorted, and only running sequences are in flight."""
    listed = [*queues.running, *queues.ready, *queues.waiting]
    if sorted(seq.id for seq in listed) != sorted(seq.id for seq in queues):
        raise InvariantError(f"queues list {sorted(seq.id for seq in listed)}, known are {sorted(seq.id for seq in queues)}")
    for queue in (queues.running, queues.ready, queues.waiting):
        if queue != sorted(queue, key=lambda seq: seq.rank):
            raise InvariantError(f"queue out of order: {[seq.id for seq in queue]}")
    if len(queues.running) > max_batch:
        raise InvariantError(f"{len(queues.running)} run, at most {max_batch} may")
    in_flight = {seq.id for seq in queues if seq.in_flight}
    if in_flight != {seq.id for seq in flying} or not in_flight <= {seq.id for seq in queues.running}:
        raise InvariantError(f"in flight by their own account {sorted(in_flight)}, in the step {[seq.id for seq in flying]}")


def _check_sequence(seq: Sequence, block_tokens: int) -> None:
    reach = seq.num_computed + seq.in_flight
    if not 0 <= seq.num_computed < seq.num_tokens < seq.max_total_tokens or reach > seq.num_tokens:
        raise InvariantError(f"{seq.id}: computed {seq.num_computed} + {seq.in_flight} of {seq.num_tokens} tokens")
    if reach > len(seq.pages) * block_tokens:
        raise InvariantError(f"{seq.id}: {len(seq.pages)} pages do not hold {reach} tokens")
    if not seq.num_full == seq.num_computed // block_tokens <= seq.num_leased <= len(seq.pages):
        raise InvariantError(f"{seq.id}: {seq.num_full} full and {seq.num_leased} leased of {len(seq.pages)} pages")
