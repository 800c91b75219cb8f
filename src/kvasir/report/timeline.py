"""What happened to one request: its token times, and the latencies that follow from them."""

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise


class Status(StrEnum):
    """How a request ended."""

    OK = "ok"
    REJECTED = "rejected"  # refused by admission: HTTP 429, with a reason
    FAILED = "failed"
    ABORTED = "aborted"  # the client gave it up


_TAIL_PER_CENT = 10
"""TBT of a request looks at the longest tenth of its token gaps (Mooncake, FAST'25)."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request's timeline, the same for a live and a simulated run; times in seconds on one clock.

    `token_times_s` holds one time per output token, ascending; tokens that arrived together share theirs. Of a request that
    failed midway it holds what came. `output_tokens` is the server's count where it gave one. `reason` is a stable word for
    whatever is not ok. `unloaded_prefill_s` is the predicted prefill of the whole prompt on an idle, empty instance.
    """

    id: str
    arrival_s: float
    input_tokens: int
    output_tokens: int = 0
    cached_tokens: int | None = None
    token_times_s: tuple[float, ...] = ()
    status: Status = Status.OK
    reason: str | None = None
    unloaded_prefill_s: float | None = None

    @property
    def first_token_s(self) -> float | None:
        """When the first token came; None if none did."""
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return self.token_times_s[0] - self.arrival_s if self.token_times_s else None

    @property
    def e2e_s(self) -> float | None:
        """Arrival to last token."""
        return self.token_times_s[-1] - self.arrival_s if self.token_times_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Times between consecutive tokens (ITL): one fewer than tokens."""
        return [later - earlier for earlier, later in pairwise(self.token_times_s)]

    @property
    def tbt_s(self) -> float | None:
        """Mean of the longest 10 % of the gaps, at least one; None without a gap (one token has no TBT to miss)."""
        gaps = self.gaps_s
        if not gaps:
            return None
        num_longest = -(-len(gaps) * _TAIL_PER_CENT // 100)
        return sum(sorted(gaps)[-num_longest:]) / num_longest

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: as `vllm bench serve` counts it."""
        num_gaps = max(self.output_tokens, len(self.token_times_s)) - 1
        if num_gaps < 1 or not self.token_times_s:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / num_gaps
