"""The sequences that decode together, advanced all at once: a pass costs nothing but what happens to somebody in it."""

from __future__ import annotations

from collections.abc import Iterator

from kvasir.core.batcher_commands import Chunk
from kvasir.scheduling.sequence import Sequence, rank_of


class DecodeSet:
    """Every member computes one token in every pass, so a member's tokens are the passes made and a constant.

    A member is due when the pass is made in which it ends, fills a block, or comes so near to the next block that a page
    must be asked for. Who is due must leave or be scheduled again. Members have the page of their next token.
    """

    __slots__ = ("_ahead_tokens", "_block_tokens", "_passes", "_schedule", "context_tokens", "growth", "members")

    def __init__(self, block_tokens: int, ahead_tokens: int):
        self._block_tokens = block_tokens
        self._ahead_tokens = ahead_tokens
        self.members: dict[str, Sequence] = {}
        self._passes = 0
        self._schedule: list[Sequence] = []  # who is due first is at the end, of several who was scheduled first
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
        schedule, due = self._schedule, seq.due
        place = self._place(due)
        while place < len(schedule) and schedule[place].due == due:
            if schedule[place] is seq:
                del schedule[place]
                break
            place += 1
        self.settle(seq)
        self.context_tokens -= seq.num_tokens
        self.growth -= seq.growth
        seq.growth = seq.due = 0

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
        while schedule and schedule[-1].due <= made:
            seq = schedule.pop()
            self.settle(seq)
            due.append(seq)
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
        seq.due = due = self._passes + passes
        self._schedule.insert(self._place(due), seq)

    def _place(self, due: int) -> int:
        """The first place in the schedule of who is due then or before."""
        schedule = self._schedule
        low, high = 0, len(schedule)
        while low < high:
            middle = (low + high) >> 1
            if schedule[middle].due > due:
                low = middle + 1
            else:
                high = middle
        return low

    def passes_until_due(self) -> int:
        """Passes to make until somebody is due. The set must not be empty."""
        return self._schedule[-1].due - self._passes
