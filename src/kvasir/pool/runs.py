"""Idle blocks in runs: what one sequence let go of at once and is worth the same, and can be handled as one."""

from __future__ import annotations

from collections.abc import Iterator

from kvasir.pool.eviction import Block


class Run:
    """Idle blocks of one sequence and one class that were released together, at `since_s`, deepest first.

    What is evicted goes from its start, and what is leased again, a prefix of the sequence, from its end.
    """

    __slots__ = ("after", "before", "blocks", "class_", "since_s")

    def __init__(self, class_: int, since_s: float):
        self.class_ = class_
        self.since_s = since_s
        self.blocks: list[Block] = []
        self.before: Run | None = None
        self.after: Run | None = None


class RunQueue:
    """Runs of one class, oldest first, out of which any can be taken: a linked list.

    Their blocks are of `uses_class`, and cost `relative_cost` times what the first block of a sequence does.
    """

    __slots__ = ("first", "last", "relative_cost", "uses_class")

    def __init__(self, uses_class: int, relative_cost: float) -> None:
        self.uses_class = uses_class
        self.relative_cost = relative_cost
        self.first: Run | None = None
        self.last: Run | None = None

    def __iter__(self) -> Iterator[Run]:
        run = self.first
        while run is not None:
            yield run
            run = run.after

    def append(self, run: Run) -> None:
        last = self.last
        run.before = last
        if last is None:
            self.first = run
        else:
            last.after = run
        self.last = run

    def remove(self, run: Run) -> None:
        before, after = run.before, run.after
        if before is None:
            self.first = after
        else:
            before.after = after
        if after is None:
            self.last = before
        else:
            after.before = before
        run.before = run.after = None
