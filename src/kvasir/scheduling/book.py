"""What a prefill instance still has to do, in predicted seconds: counted when it is sent, so that a burst spreads."""

from __future__ import annotations

from dataclasses import dataclass

from kvasir.core.errors import InvariantError


@dataclass(frozen=True, slots=True)
class _Entry:
    seconds: float
    tokens: int
    sent_s: float


class PrefillBook:
    """Predictions of the prefills sent to one instance and not yet done, in the order sent.

    `_done_s` of the pending seconds were worked off as of `_as_of_s`; since then the instance works in real time, but
    never past the predicted end of its first prefill, which is still not done.
    """

    __slots__ = ("_as_of_s", "_done_s", "_entries", "_pending_s")

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._pending_s = 0.0
        self._done_s = 0.0
        self._as_of_s = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def wait_s(self, now: float) -> float:
        """Seconds until all that was sent will be done."""
        if not self._entries:
            return 0.0
        return self._pending_s - self._worked_s(now)

    def sent(self, request_id: str, *, seconds: float, tokens: int, now: float) -> None:
        """A prefill of `tokens` new tokens, predicted to take `seconds`."""
        if not self._entries:
            self._done_s, self._as_of_s = 0.0, now
        self._entries[request_id] = _Entry(seconds, tokens, now)
        self._pending_s += seconds

    def left(self, request_id: str, now: float) -> None:
        """The prefill is done, or will never be; unknown ids are ignored."""
        entry = self._entries.get(request_id)
        if entry is None:
            return
        worked_s = self._worked_s(now)
        is_first = next(iter(self._entries)) == request_id
        del self._entries[request_id]
        self._pending_s = self._pending_s - entry.seconds if self._entries else 0.0
        self._done_s = 0.0 if is_first else min(worked_s, self._pending_s)
        self._as_of_s = now

    def reported(self, waiting_tokens: int, *, sent_before_s: float, now: float) -> None:
        """The instance says how many tokens it has not computed; what was sent later it may not have seen."""
        seen = [entry for entry in self._entries.values() if entry.sent_s <= sent_before_s]
        tokens = sum(entry.tokens for entry in seen)
        if not tokens:
            return
        share_left = min(1.0, waiting_tokens / tokens)
        self._done_s = (1.0 - share_left) * sum(entry.seconds for entry in seen)
        self._as_of_s = now

    def expire(self, *, sent_before_s: float, now: float) -> list[str]:
        """Drop predictions so old that they say nothing any more; their requests live on. Returns their ids."""
        old = [request_id for request_id, entry in self._entries.items() if entry.sent_s + entry.seconds < sent_before_s]
        for request_id in old:
            self.left(request_id, now)
        return old

    def check(self) -> None:
        """Raises InvariantError unless the sums add up."""
        pending_s = sum(entry.seconds for entry in self._entries.values())
        if abs(pending_s - self._pending_s) > 1e-6 * max(1.0, pending_s):
            raise InvariantError(f"pending seconds: booked {self._pending_s}, entries sum to {pending_s}")

    def _worked_s(self, now: float) -> float:
        if not self._entries:
            return 0.0
        first_s = next(iter(self._entries.values())).seconds
        most_s = max(first_s, self._done_s)
        return min(self._done_s + max(0.0, now - self._as_of_s), most_s, self._pending_s)
