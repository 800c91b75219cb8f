"""One direction of the SSD: the requests that wait, and what came of those that ran."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic

from kvasir.store.ssd.meter import Meter
from kvasir.store.ssd.requests import Request, SsdOutcome

OnDone = Callable[[SsdOutcome], None]


class Job(Generic[Request]):
    """A request, whom to tell, and until when it may wait."""

    __slots__ = ("deadline_s", "on_done", "request")

    def __init__(self, request: Request, on_done: OnDone, deadline_s: float | None):
        self.request: Request = request
        self.on_done = on_done
        self.deadline_s = deadline_s

    def is_late(self, now: float) -> bool:
        return self.deadline_s is not None and self.deadline_s <= now


class Lane(Generic[Request]):
    """At most `limit` requests wait. Not for several threads at once, but `brought` is the loop's alone.

    That is what came in this turn of the loop. `line_up` puts it in line: so a turn needs the lock once, and neighbours come
    together.
    """

    def __init__(self, limit: int, perform: Callable[[Sequence[Request]], list[SsdOutcome]]):
        self.limit = limit
        self.perform: Callable[[Sequence[Request]], list[SsdOutcome]] = perform
        self.queue: deque[Job[Request]] = deque()
        self.brought: list[Job[Request]] = []
        self.meter = Meter()
        self.outcomes = dict.fromkeys(SsdOutcome, 0)

    def line_up(self) -> list[OnDone]:
        """Put what was brought in line as far as there is room; whom to tell that there was none."""
        jobs, self.brought = self.brought, []
        room = max(0, self.limit - len(self.queue))
        self.queue.extend(jobs[:room])
        return self._dropped(jobs[room:])

    def take(self, max_blocks: int) -> list[Job[Request]]:
        """The first of the queue and those that follow it in place."""
        jobs = [self.queue.popleft()]
        while len(jobs) < max_blocks and self.queue and self.queue[0].request.ssd_slot == jobs[-1].request.ssd_slot + 1:
            jobs.append(self.queue.popleft())
        return jobs

    def drop(self, is_chosen: Callable[[Job[Request]], bool]) -> list[OnDone]:
        """Take these from the queue; whom to tell."""
        dropped = [job for job in self.queue if is_chosen(job)]
        if dropped:
            self.queue = deque(job for job in self.queue if not is_chosen(job))
        return self._dropped(dropped)

    def count(self, outcomes: Sequence[SsdOutcome]) -> int:
        """These came of an operation; how many are good."""
        good = outcomes.count(SsdOutcome.OK)
        self.outcomes[SsdOutcome.OK] += good
        if good < len(outcomes):
            for outcome in outcomes:
                self.outcomes[outcome] += outcome is not SsdOutcome.OK
        return good

    def first_deadline(self) -> float | None:
        """Of those that wait."""
        return min((job.deadline_s for job in self.queue if job.deadline_s is not None), default=None)

    def _dropped(self, jobs: Sequence[Job[Request]]) -> list[OnDone]:
        if jobs:
            self.outcomes[SsdOutcome.DROPPED] += len(jobs)
        return [job.on_done for job in jobs]
