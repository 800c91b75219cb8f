"""The sequences of one instance by what they wait for, each queue sorted by rank."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from kvasir.scheduling.decode_set import DecodeSet
from kvasir.scheduling.sequence import Sequence, rank_of


class Queues:
    """Each sequence is in one place.

        not begun          begun: has been in a step here
        `waiting`          `begun`                a prompt with tokens to compute
        `idle`             `idle`                 a prompt that the pipeline's stage before holds up
        `ready`            `paused` | `decodes`   a single token left; `paused` is about to get a page, or short of one

    Outside of `Batcher.handle`, `decodes` are in flight.
    """

    __slots__ = ("_by_id", "begun", "decodes", "idle", "paused", "ready", "waiting")

    def __init__(self, decodes: DecodeSet) -> None:
        self._by_id: dict[str, Sequence] = {}
        self.decodes = decodes
        self.paused: list[Sequence] = []
        self.begun: list[Sequence] = []
        self.ready: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.idle: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def get(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    @property
    def lists(self) -> tuple[list[Sequence], ...]:
        return (self.paused, self.begun, self.ready, self.waiting, self.idle)

    @property
    def is_busy(self) -> bool:
        return bool(self._by_id)

    @property
    def has_only_decodes(self) -> bool:
        """Whether nobody could join a step but those who decode already."""
        return not (self.paused or self.begun or self.ready or self.waiting)

    @property
    def num_running(self) -> int:
        """Who takes a seat of the batch: begun, and not idle."""
        return len(self.decodes.members) + len(self.paused) + len(self.begun)

    def add(self, seq: Sequence) -> None:
        self._by_id[seq.id] = seq
        self.place(seq)

    def place(self, seq: Sequence) -> None:
        """Into the queue where it belongs by its tokens; never into `decodes`."""
        if seq.is_decoding:
            home = self.paused if seq.has_begun else self.ready
        elif seq.computable <= 0:
            home = self.idle
        else:
            home = self.begun if seq.has_begun else self.waiting
        if seq.home is home:
            return
        self._take_out(seq)
        if not home or home[-1].rank < seq.rank:  # mostly
            home.append(seq)
        else:
            insort(home, seq, key=rank_of)
        seq.home = home

    def begin(self, seq: Sequence) -> None:
        """A prompt's first chunk is in the step."""
        seq.has_begun = True
        self.place(seq)

    def decode(self, seq: Sequence) -> None:
        """From `ready` or `paused` into `decodes`."""
        seq.has_begun = True
        self._take_out(seq)
        seq.home = None
        self.decodes.add(seq)

    def remove(self, seq: Sequence) -> None:
        del self._by_id[seq.id]
        self._take_out(seq)

    def prompts(self, seats: int) -> list[Sequence]:
        """Who begins or goes on, in order of rank; at most `seats` begin. To be read only, before anybody is placed."""
        if seats <= 0 or not self.waiting:
            return self.begun
        joining = self.waiting if seats >= len(self.waiting) else self.waiting[:seats]
        return sorted(self.begun + joining, key=rank_of) if self.begun else joining

    @property
    def oldest(self) -> Sequence:
        """Who must make progress: running before waiting. There must be somebody who can, given pages; nobody decodes."""
        running = self.paused[:1] + self.begun[:1]
        return min(running or self.ready[:1] + self.waiting[:1], key=rank_of)

    def _take_out(self, seq: Sequence) -> None:
        if seq.due:
            self.decodes.remove(seq)
        elif (home := seq.home) is not None:
            del home[0 if home[0] is seq else bisect_left(home, seq.rank, key=rank_of)]
