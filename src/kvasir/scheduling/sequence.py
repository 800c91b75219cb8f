"""One request as a Batcher sees it: how far it is, and which pages hold it."""

from __future__ import annotations

from operator import attrgetter

rank_of = attrgetter("rank")


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

    __slots__ = (
        "available",
        "due",
        "end",
        "growth",
        "hand_off",
        "has_begun",
        "home",
        "id",
        "in_flight",
        "is_cancelled",
        "is_stage",
        "max_total_tokens",
        "num_computed",
        "num_full",
        "num_leased",
        "num_tokens",
        "offset",
        "pages",
        "rank",
        "share",
    )

    def __init__(
        self,
        request_id: str,
        *,
        num_tokens: int,
        num_computed: int,
        max_total_tokens: int,
        pages: tuple[int, ...],
        hand_off: bool,
        share: float,
        available: int | None,
        is_stage: bool,
    ):
        """All as in Submitted; the Batcher says which `rank` it has."""
        self.id = request_id
        self.num_tokens = num_tokens
        self.num_computed = num_computed
        self.max_total_tokens = max_total_tokens
        self.hand_off = hand_off
        self.is_stage = is_stage
        self.end = num_tokens if hand_off or is_stage else max_total_tokens - 1
        self.pages = pages
        self.num_leased = len(pages)
        self.num_full = 0
        self.share = share
        self.available = available
        self.rank: tuple[int, float, int] = (0, 0.0, 0)
        self.has_begun = False
        self.in_flight = 0
        self.is_cancelled = False
        self.home: list[Sequence] | None = None
        """The queue that it is in."""
        self.due = 0
        """When it is due in a DecodeSet, in passes of that; 0 outside."""
        self.offset = 0
        """Tokens computed, less passes made: constant while in a DecodeSet."""
        self.growth = 0
        """Pages that the DecodeSet counts for it."""

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
