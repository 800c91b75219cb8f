"""What a messenger counts, by transport."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

WEIGHT = 0.2
"""Of the newest transfer in the moving average of the bandwidth."""

MEASURED_BYTES = 256 << 10
"""Smaller transfers say more about latency than about bandwidth."""


@dataclass(slots=True)
class TransportStats:
    """Since the start. `retries` are attempts after a first one failed; `active` is how many are under way now.

    `bytes_s` is a moving average over transfers of at least 256 KiB, None before the first. `failures` is by cause.
    """

    transfers: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    retries: int = 0
    active: int = 0
    bytes_s: float | None = None
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, nbytes: int, seconds: float) -> None:
        self.transfers += 1
        self.nbytes += nbytes
        self.seconds += seconds
        if nbytes >= MEASURED_BYTES and seconds > 0.0:
            newest = nbytes / seconds
            self.bytes_s = newest if self.bytes_s is None else self.bytes_s + WEIGHT * (newest - self.bytes_s)
