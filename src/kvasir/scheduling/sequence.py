"""One request as a Batcher sees it: how far it is, and which pages hold it."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter

from kvasir.core.events import Submitted

rank_of = attrgetter("rank")


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and pages of one request on one instance.

        pages   | full: read only      | tail: written here     |
                0        num_full      num_leased (0 or 1 apart, an adopted tail)         len(pages)
        tokens  0 .. num_computed .. num_tokens .. end

    `pages[:num_leased]` belong to the request's lease in the pool, the rest is private to this instance. Of `pages`, those
    below `num_full` are published and never written again. `end` is how many tokens will be computed at most: the
    prompt if the sequence leaves after it, else all but the very last token, whose KV nobody needs.

    In a chunked pipeline only the first `available` tokens may be computed yet; None says all, and for good. While the
    sequence is in a DecodeSet, which advances it, `num_computed` and `num_tokens` are as of its last settling.
    """

    id: str
    rank: tuple[int, float, int]
    num_tokens: int
    num_computed: int
    max_total_tokens: int
    hand_off: bool
    end: int
    pages: tuple[int, ...]
    num_leased: int
    num_full: int
    share: float = 1.0
    available: int | None = None
    is_stage: bool = False
    has_begun: bool = False
    in_flight: int = 0
    is_cancelled: bool = False
    home: list[Sequence] | None = field(default=None, repr=False)  # the queue that it is in
    ticket: int = 0  # its place in a DecodeSet's schedule; 0 outside
    offset: int = 0  # tokens computed, less passes made: constant while in a DecodeSet
    growth: int = 0  # pages that the DecodeSet counts for it

    @property
    def remaining(self) -> int:
        """Tokens known but not computed."""
        return self.num_tokens - self.num_computed

    @property
    def computable(self) -> int:
        """Tokens that may be computed now; not above 0 when the stage before must come first."""
        return (self.num_tokens if self.available is None else self.available) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """One token is left, and it is not a stage's: a pass computes it and draws the next."""
        return self.num_tokens - self.num_computed == 1 and self.available is None and not self.is_stage

    @property
    def order(self) -> int:
        """Which submission it was."""
        return self.rank[2]

    @property
    def private(self) -> tuple[int, ...]:
        return self.pages[self.num_leased :]

    def pages_for(self, tokens: int, block_tokens: int) -> int:
        """Pages missing to hold the first `tokens` tokens, of those that will be computed."""
        missing = -(-min(tokens, self.end) // block_tokens) - len(self.pages)
        return max(0, missing)


def sequence_of(event: Submitted, *, rank: tuple[int, float, int], block_tokens: int) -> Sequence:
    return Sequence(
        id=event.request_id,
        rank=rank,
        num_tokens=event.num_tokens,
        num_computed=event.num_computed,
        max_total_tokens=event.max_total_tokens,
        hand_off=event.hand_off,
        end=event.num_tokens if event.hand_off or event.is_stage else event.max_total_tokens - 1,
        pages=event.pages,
        num_leased=len(event.pages),
        num_full=event.num_computed // block_tokens,
        share=event.share,
        available=event.available,
        is_stage=event.is_stage,
    )
