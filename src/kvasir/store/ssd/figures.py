"""How much the SSD's threads take on, and what they have to tell."""

from __future__ import annotations

from dataclasses import dataclass

from kvasir.store.ssd.requests import SsdOutcome


@dataclass(frozen=True, slots=True)
class SsdQueues:
    """How much is under way and waits at most."""

    depth: int = 8
    """Operations that the disk shall have at a time, in each direction. Half as many again are begun, and hashed meanwhile."""
    max_reads: int = 8192
    """Blocks that wait: a prompt of 512k tokens in blocks of 64."""
    max_writes: int = 256
    max_merged_bytes: int = 4 << 20
    """Bytes of neighbouring blocks in one operation."""

    @property
    def under_way(self) -> int:
        """Operations begun and not over, at most, in each direction."""
        return self.depth + self.depth // 2


@dataclass(frozen=True, slots=True)
class SsdStats:
    """Counts since the start in operations, blocks by their outcome, and the state now.

    `*_busy_s` are seconds with an operation under way, `*_bytes_per_s` moving averages over them (None before the first).
    `oldest_s` is how long the oldest operation under way has been there: seconds on a disk that hangs.
    """

    read_operations: int
    write_operations: int
    read_bytes: int
    write_bytes: int
    read_busy_s: float
    write_busy_s: float
    read_bytes_per_s: float | None
    write_bytes_per_s: float | None
    read_outcomes: dict[SsdOutcome, int]
    write_outcomes: dict[SsdOutcome, int]
    queued_reads: int
    queued_writes: int
    reads_in_flight: int
    writes_in_flight: int
    oldest_s: float
    errors: dict[str, int]
    is_direct: bool
