"""The sequences that decode together, advanced all at once: a pass costs nothing but what happens to somebody in it."""

from __future__ import annotations

from collections.abc import Iterator

from kvasir.core.batcher_commands import Chunk
from kvasir.scheduling.sequence import Sequence, rank_of


class _Due:
    """Member `seq` is due when so many `passes` are made; void when it has another ticket."""

    __slots__ = ("passes", "seq", "ticket")

    def __init__(self, passes: int, seq: Sequence):
        self.passes = passes
        self.seq = seq
        self.ticket = seq.ticket


class DecodeSet:
    """Every member computes one token in every pass, so a member's tokens are the passes made and a constant.

    A member is due when the pass is made in which it ends, fills a block, or comes so near to the next block that a page
    must be asked for. Who is due must leave or be scheduled again. Members have the page of their next token.
    """

    __slots__ = ("_ahead_tokens", "_block_tokens", "_passes", "_schedule", "_tickets", "context_tokens", "growth", "members")

    def __init__(self, block_tokens: int, ahead_tokens: int):
        self._block_tokens = block_tokens
        self._ahead_tokens = ahead_tokens
        self.members: dict[str, Sequence] = {}
        self._passes = 0
        self._tickets = 0
        self._schedule: list[_Due] = []  # who is due first is at the end, of several the least ticket
        self.context_tokens = 0
        """Tokens read by the next pass: for each member those computed and the one that it computes."""
        self.growth = 0
        """Pages that members will need soon."""

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.members.values())

    def chunks(self) -> Iterator[Chunk]:
        """The next pass, in order of rank, as what happens to members is told."""
        passes = self._passes
        for seq in sorted(self.members.values(), key=rank_of):
            yield Chunk(seq.id, passes + seq.offset, 1, seq.pages, True)

    def add(self, seq: Sequence) -> None:
        self.members[seq.id] = seq
        seq.offset = seq.num_computed - self._passes
        self.context_tokens += seq.num_tokens
        self.schedule(seq)

    def remove(self, seq: Sequence) -> None:
        del self.members[seq.id]
        self.settle(seq)
        self.context_tokens -= seq.num_tokens
        self.growth -= seq.growth
        seq.growth = seq.ticket = 0

    def settle(self, seq: Sequence) -> None:
        """Let the member itself say how far it is."""
        seq.num_computed = self._passes + seq.offset
        seq.num_tokens = seq.num_computed + 1

    def advance(self, passes: int) -> list[Sequence]:
        """`passes` were made, at most `passes_until_due`; returns who is due, settled."""
        self._passes += passes
        self.context_tokens += passes * len(self.members)
        due: list[Sequence] = []
        schedule, made = self._schedule, self._passes
        while schedule and schedule[-1].passes <= made:
            first = schedule.pop()
            if first.seq.ticket == first.ticket:
                self.settle(first.seq)
                due.append(first.seq)
        return due

    def schedule(self, seq: Sequence) -> None:
        """For a settled member: when is it due next?"""
        block_tokens, ahead = self._block_tokens, self._ahead_tokens
        computed, end = seq.num_computed, seq.end
        reach = computed + 1 + ahead
        growth = seq.pages_for(reach, block_tokens)
        self.growth += growth - seq.growth
        seq.growth = growth
        passes = min(block_tokens - computed % block_tokens, end - computed)
        if reach < end:
            passes = min(passes, block_tokens - (computed + ahead) % block_tokens)
        self._tickets += 1
        seq.ticket = self._tickets
        self._plan(_Due(self._passes + passes, seq))

    def _plan(self, due: _Due) -> None:
        schedule = self._schedule
        low, high = 0, len(schedule)
        while low < high:
            middle = (low + high) >> 1
            if schedule[middle].passes > due.passes:
                low = middle + 1
            else:
                high = middle
        schedule.insert(low, due)

    def passes_until_due(self) -> int:
        """Passes to make until somebody is due. The set must not be empty."""
        schedule = self._schedule
        while schedule[-1].ticket != schedule[-1].seq.ticket:
            schedule.pop()
        return schedule[-1].passes - self._passes
