"""How busy a direction of the SSD is and how fast, from the times at which its operations start and end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

MEMORY_S = 1.0
"""Busy seconds after which an older speed counts for a third."""

SAMPLE_S = 0.01
"""Busy seconds that make a sample: shorter ones say more about the clock than about the disk."""


@dataclass(slots=True)
class Meter:
    """Only time with an operation in flight counts, so that an idle disk does not look slow."""

    in_flight: int = 0
    operations: int = 0
    num_bytes: int = 0
    busy_s: float = 0.0
    bytes_per_s: float | None = None
    """Moving average; None until there is a sample."""
    _since: float = 0.0
    _sample_s: float = field(default=0.0, repr=False)
    _sample_bytes: int = field(default=0, repr=False)

    def started(self, now: float) -> None:
        """An operation began."""
        self._pass_time(now)
        self.in_flight += 1

    def ended(self, now: float, num_bytes: int) -> None:
        """It is over and moved so many good bytes."""
        self._pass_time(now)
        self.in_flight -= 1
        self.operations += 1
        self.num_bytes += num_bytes
        self._sample_bytes += num_bytes
        if self._sample_s >= SAMPLE_S:
            self._take_sample()

    def _pass_time(self, now: float) -> None:
        if self.in_flight:
            self.busy_s += now - self._since
            self._sample_s += now - self._since
        self._since = now

    def _take_sample(self) -> None:
        rate = self._sample_bytes / self._sample_s
        old_share = math.exp(-self._sample_s / MEMORY_S)
        self.bytes_per_s = rate if self.bytes_per_s is None else old_share * self.bytes_per_s + (1 - old_share) * rate
        self._sample_s, self._sample_bytes = 0.0, 0
