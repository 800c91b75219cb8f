"""The eviction order of a node that pins blocks, ranks them or has quotas: made when the first of it is asked for.

It stands around the node's own policy, which goes on to order what nobody said anything about:

    victim: what has low priority, then what the policy says, then what has high priority; never what is pinned
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import Priority
from kvasir.pool.eviction import Block, Eviction, Lru
from kvasir.pool.pins import Pins
from kvasir.pool.quotas import Quotas
from kvasir.pool.slots import SlotTable

MAX_PINNED_SHARE = 0.5
"""Of the slots: the other half is left to serve those who did not pin."""


class Retention:
    """Implements Eviction over the order that the slots had; every operation costs O(1) more than that one's.

    Only picking a tenant's own block costs O(its idle blocks) while anything is pinned or ranked.
    """

    def __init__(self, dram: SlotTable, policy: Eviction):
        self.pins = Pins(int(dram.num_slots * MAX_PINNED_SHARE))
        self.quotas = Quotas()
        self._dram = dram
        self._classes: dict[Priority, Eviction] = {Priority.LOW: Lru(), Priority.NORMAL: policy, Priority.HIGH: Lru()}
        self._kept = Lru()
        self._front = Lru()  # was picked to go, and stayed after all
        self._place: dict[Block, Eviction] = dict.fromkeys(policy, self._classes[Priority.NORMAL])
        for block in dram.index.values():
            self.quotas.entered(block, "")
        for block in sorted(policy, key=lambda block: -block.depth):
            self.quotas.released(block)

    # --- the eviction order ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._place)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._place)

    def add(self, blocks: list[Block], now: float) -> None:
        for block in blocks:
            place = self._place[block] = self._place_of(block)
            place.add([block], now)
            self.quotas.released(block)

    def remove(self, blocks: list[Block], now: float) -> None:
        for block in blocks:
            self._place.pop(block).remove([block], now)
            self.quotas.leased(block)

    def forget(self, block: Block, now: float) -> None:
        self._place.pop(block).forget(block, now)
        self._left(block, now)

    def victims(self, count: int, now: float) -> list[Block]:
        blocks: list[Block] = []
        while len(blocks) < count and (block := self._pick(now)) is not None:
            del self._place[block]
            self._left(block, now)
            blocks.append(block)
        return blocks

    # --- what goes out of order --------------------------------------------------------------------------------

    def evict_own(self, tenant: str, count: int, now: float) -> list[Block]:
        """Free up to `count` slots of blocks of the tenant's own, those that go first."""
        gone: list[Block] = []
        while len(gone) < count and (block := self._first_own(tenant)) is not None:
            self.forget(block, now)
            self._dram.unpublish(block)
            gone.append(block)
        return gone

    def trim(self, now: float) -> list[Block]:
        """Free the slots of what tenants have too many of, as far as nobody leases it."""
        gone: list[Block] = []
        for tenant, limit in self.quotas.limits.items():
            if (excess := self.quotas.published[tenant] - limit) > 0:
                gone += self.evict_own(tenant, excess, now)
        return gone

    def evict_copies(self, num_free: int, copies: Collection[BlockKey], now: float) -> list[Block]:
        """Free slots up to `num_free` as long as what goes next is in `copies`, those that are elsewhere too."""
        gone: list[Block] = []
        while len(self._dram.free) < num_free and (block := self._pick(now)) is not None:
            if block.key not in copies:
                self._front.add([block], now)
                self._place[block] = self._front
                break
            del self._place[block]
            self._left(block, now)
            self._dram.unpublish(block)
            gone.append(block)
        return gone

    # --- what is asked -----------------------------------------------------------------------------------------

    def pin(self, keys: Sequence[BlockKey], until_s: float, priority: Priority, now: float) -> int | None:
        """Mark the longest prefix of `keys` that is here; its length, or None when that would pin too many."""
        blocks = self._prefix(keys)
        if until_s > now and not self.pins.has_room(blocks):
            return None
        self.pins.mark(blocks, until_s, priority, now)
        self._replace([block.key for block in reversed(blocks)], now)
        return len(blocks)

    def unpin(self, keys: Sequence[BlockKey], now: float) -> None:
        self._replace(self.pins.unmark(keys), now)

    def expire(self, now: float) -> None:
        """Let pins end."""
        self._replace(self.pins.expire(now), now)

    def problems(self) -> Iterator[str]:
        """Each broken invariant, in words."""
        yield from self.pins.problems(self._dram.index)
        yield from self.quotas.problems(self._dram.index.values(), self._place)
        places = [*self._classes.values(), self._kept, self._front]
        if Counter(block for place in places for block in place) != Counter(list(self._place)):
            yield "idle blocks are in more than one class, or in none"
        for block, place in self._place.items():
            if (place is self._kept) != self.pins.is_pinned(block.key):
                yield f"slot {block.slot} is pinned and may go, or neither"

    def _place_of(self, block: Block) -> Eviction:
        return self._kept if self.pins.is_pinned(block.key) else self._classes[self.pins.priority(block)]

    def _pick(self, now: float) -> Block | None:
        """Taken out of its class, but not forgotten here."""
        for place in (self._front, *self._classes.values()):
            if victims := place.victims(1, now):
                return victims[0]
        return None

    def _first_own(self, tenant: str) -> Block | None:
        idle = self.quotas.idle(tenant)
        if not self.pins:
            return next(iter(idle), None)
        may_go = (block for block in idle if self._place[block] is not self._kept)
        return min(may_go, key=self.pins.priority, default=None)

    def _left(self, block: Block, now: float) -> None:
        self.quotas.left(block)
        if self.pins:
            self._replace([marked for marked in self.pins.gone(block.key) if marked != block.key], now)

    def _prefix(self, keys: Sequence[BlockKey]) -> list[Block]:
        """The blocks of the longest prefix that is here; of what does not start at a first block, nothing."""
        blocks: list[Block] = []
        for depth, key in enumerate(keys):
            block = self._dram.index.get(key)
            if block is None or block.depth != depth:
                break
            blocks.append(block)
        return blocks

    def _replace(self, keys: Sequence[BlockKey], now: float) -> None:
        """Move those that are idle to where they belong now; given deepest first."""
        for key in keys:
            block = self._dram.index[key]
            place = self._place.get(block)
            if place is None:
                continue
            new = self._place_of(block)
            if new is not place:
                place.forget(block, now)
                new.add([block], now)
                self._place[block] = new
