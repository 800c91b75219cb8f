"""One node's slots and eviction policy as a cache that a trace is replayed against (`workload.cache_model.hit_rates`)."""

from __future__ import annotations

from collections.abc import Sequence

from kvasir.core.keys import BlockKey
from kvasir.pool.eviction import Eviction
from kvasir.pool.slots import SlotTable


class CacheReplay:
    """Requests come one after another; each leases its prefix, publishes the rest as far as there is room, and releases."""

    def __init__(self, num_slots: int, eviction: Eviction):
        self.slots = SlotTable(num_slots, eviction)

    def serve(self, keys: Sequence[BlockKey], now: float) -> int:
        """The number of leading blocks that were there."""
        pinned = self.slots.pin_prefix(keys, now)
        hits = len(pinned)
        slots, _ = self.slots.take(len(keys) - hits, now)
        for depth, slot in enumerate(slots, start=hits):
            first = self.slots.publish(keys[depth], slot, depth, now)
            if first.slot != slot:
                self.slots.give_back([slot])
            pinned.append(first)
        self.slots.unpin(pinned, now)
        return hits
