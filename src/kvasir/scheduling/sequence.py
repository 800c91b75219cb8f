"""One request as a Batcher sees it: how far it is, and which pages hold it."""

from __future__ import annotations

from dataclasses import dataclass

from kvasir.core.events import Submitted


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and pages of one request on one instance.

        pages   | full: read only      | tail: written here     |
                0        num_full      num_leased (0 or 1 apart, an adopted tail)         len(pages)
        tokens  0 .. num_computed .. num_tokens .. end

    `pages[:num_leased]` belong to the request's lease in the pool, the rest is private to this instance. Of `pages`, those
    below `num_full` are published and never written again. `end` is how many tokens will be computed at most: the
    prompt if the sequence hands off, else all but the very last token, whose KV nobody needs.
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
    in_flight: int = 0
    is_cancelled: bool = False

    @property
    def remaining(self) -> int:
        """Tokens known but not computed."""
        return self.num_tokens - self.num_computed

    @property
    def order(self) -> int:
        """Which submission it was."""
        return self.rank[2]

    @property
    def private(self) -> tuple[int, ...]:
        return self.pages[self.num_leased :]

    def pages_for(self, tokens: int, block_tokens: int) -> int:
        """Pages missing to hold the first `tokens` tokens, of those that will be computed."""
        covered = min(tokens, self.end)
        return max(0, -(-covered // block_tokens) - len(self.pages))


def sequence_of(event: Submitted, *, rank: tuple[int, float, int], block_tokens: int) -> Sequence:
    return Sequence(
        id=event.request_id,
        rank=rank,
        num_tokens=event.num_tokens,
        num_computed=event.num_computed,
        max_total_tokens=event.max_total_tokens,
        hand_off=event.hand_off,
        end=event.num_tokens if event.hand_off else event.max_total_tokens - 1,
        pages=event.pages,
        num_leased=len(event.pages),
        num_full=event.num_computed // block_tokens,
    )
