"""The sequences of one instance by what they wait for, each queue sorted by rank."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from kvasir.scheduling.sequence import Sequence

_rank = attrgetter("rank")


class Queues:
    """`running` has been in a step here; `ready` waits with a single token to compute, `waiting` with a prompt."""

    __slots__ = ("_by_id", "ready", "running", "waiting")

    def __init__(self) -> None:
        self._by_id: dict[str, Sequence] = {}
        self.running: list[Sequence] = []
        self.ready: list[Sequence] = []
        self.waiting: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def get(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    def add(self, seq: Sequence) -> None:
        self._by_id[seq.id] = seq
        insort(self.ready if seq.remaining == 1 else self.waiting, seq, key=_rank)

    def start(self, seq: Sequence) -> None:
        """From `ready` or `waiting` to `running`."""
        _take(self.ready if seq.remaining == 1 else self.waiting, seq)
        insort(self.running, seq, key=_rank)

    def remove(self, seq: Sequence) -> None:
        del self._by_id[seq.id]
        for queue in (self.running, self.ready, self.waiting):
            if _take(queue, seq):
                return

    @property
    def oldest(self) -> Sequence:
        """Who must make progress; running before waiting. The queues must not be empty."""
        if self.running:
            return self.running[0]
        return min(self.ready[:1] + self.waiting[:1], key=_rank)


def _take(queue: list[Sequence], seq: Sequence) -> bool:
    index = bisect_left(queue, seq.rank, key=_rank)
    if index < len(queue) and queue[index] is seq:
        del queue[index]
        return True
    return False
