"""What a prefill instance still has to do, in predicted seconds: counted when it is sent, so that a burst spreads."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from operator import attrgetter
from typing import Final

from mypy_extensions import mypyc_attr

from kvasir.core.errors import InvariantError


@mypyc_attr(acyclic=True)
class Entry:
    """A prefill sent: predicted seconds, new tokens, its place in the queue (`rank`, ties by `number`), when it is due."""

    __slots__ = ("due_s", "number", "rank", "request_id", "seconds", "sent_s", "tokens")

    def __init__(self, request_id: str, seconds: float, tokens: int, *, sent_s: float, rank: float, number: int, due_s: float):
        self.request_id = request_id
        self.seconds = seconds
        self.tokens = tokens
        self.sent_s = sent_s
        self.rank = rank
        self.number = number
        self.due_s = due_s


_place: Final = attrgetter("rank", "number")
_rank: Final = attrgetter("rank")


class PrefillBook:
    """Predictions of the prefills sent to one instance and not yet done, in the order in which it will take them.

    `_done_s` of the pending seconds were worked off as of `_as_of_s`; since then the instance works at `_pace` seconds
    a second (below 1 where it decodes beside), but never past the predicted end of its first prefill, which is not done.
    """

    __slots__ = ("_as_of_s", "_by_id", "_done_s", "_number", "_order", "_pace", "pending_s", "tokens")

    def __init__(self) -> None:
        self._by_id: dict[str, Entry] = {}
        self._order: list[Entry] = []
        self._number = 0
        self._done_s = 0.0
        self._as_of_s = 0.0
        self._pace = 1.0
        self.pending_s = 0.0
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    @property
    def pace(self) -> float:
        return self._pace

    @property
    def columns(self) -> tuple[float, float, float, float, float]:
        """pending, done as of, as of, the most that can be done by now, pace: see `wait_s`, which computes with them."""
        return self.pending_s, self._done_s, self._as_of_s, self._most_s, self._pace

    @property
    def free_s(self) -> float:
        """When all that was sent will be done, if nothing takes longer than predicted."""
        return self._as_of_s + (self.pending_s - self._done_s) / self._pace

    @property
    def least_wait_s(self) -> float:
        """Seconds that remain however much time passes, until the first prefill is done."""
        return (self.pending_s - self._most_s) / self._pace

    @property
    def last_rank(self) -> float:
        """Of what goes last; -inf where there is nothing."""
        return self._order[-1].rank if self._order else -math.inf

    def wait_s(self, now: float, rank: float = math.inf) -> float:
        """Seconds until all that goes before `rank` will be done; by default, all that was sent."""
        order = self._order
        if not order:
            return 0.0
        before_s = self.pending_s
        if rank < order[-1].rank:
            before_s = sum([entry.seconds for entry in order[: bisect_right(order, rank, key=_rank)]], 0.0)
        left_s = before_s - self._worked_s(now)
        return left_s / self._pace if left_s > 0.0 else 0.0

    def spare_s(self, now: float, rank: float) -> float:
        """By how many seconds of work all that comes after `rank` can be put off and still be done when due.

        What will be late in any case has nothing to lose.
        """
        spare_s = math.inf
        until_s = -self._worked_s(now)
        for entry in self._order:
            until_s += entry.seconds
            if entry.rank > rank and (left_s := (entry.due_s - now) * self._pace - until_s) >= 0.0:
                spare_s = min(spare_s, left_s)
        return spare_s

    def sent(
        self, request_id: str, *, seconds: float, tokens: int, now: float, rank: float | None = None, due_s: float = math.inf
    ) -> None:
        """A prefill of `tokens` new tokens, predicted to take `seconds`; by default it goes last (rank: now)."""
        if not self._order:
            self._done_s, self._as_of_s = 0.0, now
        self._number += 1
        rank = now if rank is None else rank
        entry = Entry(request_id, seconds, tokens, sent_s=now, rank=rank, number=self._number, due_s=due_s)
        self._by_id[request_id] = entry
        order = self._order
        if not order or order[-1].rank <= rank:  # mostly
            order.append(entry)
        else:
            insort(order, entry, key=_place)
        self.pending_s += seconds
        self.tokens += tokens

    def left(self, request_id: str, now: float) -> None:
        """The prefill is done, or will never be; unknown ids are ignored."""
        entry = self._by_id.get(request_id)
        if entry is None:
            return
        del self._by_id[request_id]
        worked_s = self._worked_s(now)
        order = self._order
        index = 0 if order[0] is entry else bisect_left(order, _place(entry), key=_place)
        del order[index]
        self.tokens -= entry.tokens
        self.pending_s = self.pending_s - entry.seconds if self._order else 0.0
        self._done_s = max(0.0, worked_s - entry.seconds) if index == 0 else min(worked_s, self.pending_s)
        self._as_of_s = now

    def at_pace(self, pace: float, now: float) -> None:
        """From now on the instance does `pace` seconds of prefill in a second; above 0."""
        if pace != self._pace:
            self._done_s, self._as_of_s, self._pace = self._worked_s(now), now, pace

    def rescale(self, factor: float) -> None:
        """All that was sent is now predicted to take so many times as long."""
        for entry in self._order:
            entry.seconds *= factor
        self.pending_s *= factor
        self._done_s *= factor

    def reported(self, waiting_tokens: int, *, sent_before_s: float, now: float) -> None:
        """The instance says how many tokens it has not computed; what was sent later it may not have seen."""
        seen_tokens, seen_s = 0, 0.0
        for entry in self._order:
            if entry.sent_s <= sent_before_s:
                seen_tokens += entry.tokens
                seen_s += entry.seconds
        if not seen_tokens:
            return
        share_left = min(1.0, waiting_tokens / seen_tokens)
        self._done_s = (1.0 - share_left) * seen_s
        self._as_of_s = now

    def expire(self, *, sent_before_s: float, now: float) -> list[str]:
        """Drop predictions so old that they say nothing any more; their requests live on. Returns their ids."""
        old = [entry.request_id for entry in self._order if entry.sent_s + entry.seconds < sent_before_s]
        for request_id in old:
            self.left(request_id, now)
        return old

    def check(self) -> None:
        """Raises InvariantError unless the sums add up and the order is one."""
        pending_s = sum(entry.seconds for entry in self._order)
        if abs(pending_s - self.pending_s) > 1e-6 * max(1.0, pending_s):
            raise InvariantError(f"pending seconds: booked {self.pending_s}, entries sum to {pending_s}")
        if self.tokens != sum(entry.tokens for entry in self._order):
            raise InvariantError(f"pending tokens: booked {self.tokens}, entries disagree")
        if sorted(self._order, key=_place) != self._order or {e.request_id for e in self._order} != self._by_id.keys():
            raise InvariantError("entries are out of order or not indexed")

    @property
    def _most_s(self) -> float:
        """What can be worked off before the first prefill is reported done."""
        return min(self.pending_s, max(self._order[0].seconds, self._done_s)) if self._order else 0.0

    def _worked_s(self, now: float) -> float:
        order = self._order
        if not order:
            return 0.0
        done_s = self._done_s
        most_s = min(self.pending_s, max(order[0].seconds, done_s))
        if now > self._as_of_s:
            done_s += (now - self._as_of_s) * self._pace
        return min(done_s, most_s)
