"""The eviction policies by name."""

from __future__ import annotations

from collections.abc import Callable

from kvasir.pool.cost_aware import BlockSeconds, CostAware
from kvasir.pool.eviction import Eviction, Lru
from kvasir.pool.frequency import LengthAware, Lfu

EVICTIONS: dict[str, Callable[[BlockSeconds], Eviction]] = {
    "lru": lambda _: Lru(),
    "lfu": lambda _: Lfu(),
    "length-aware": lambda _: LengthAware(),
    "cost-aware": CostAware,
}
"""A policy from the seconds that computing a block of some depth again takes; `block_seconds` has them from a cost model."""
