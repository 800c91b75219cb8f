"""Whose block is whose: how many each tenant has published, how many it may, and which of them are idle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from kvasir.core.pool_events import TenantStats
from kvasir.pool.eviction import Block


class Quotas:
    """Blocks by tenant. A tenant without a quota is counted only."""

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}
        self.published: Counter[str] = Counter()
        self._tenants: dict[Block, str] = {}
        self._idle: dict[str, dict[Block, None]] = {}  # by tenant, an ordered set: least recently used first

    def room(self, tenant: str) -> int | None:
        """How many more blocks the tenant may publish; None is any number."""
        limit = self.limits.get(tenant)
        return None if limit is None else max(0, limit - self.published[tenant])

    def idle(self, tenant: str) -> Iterable[Block]:
        return self._idle.get(tenant, ())

    def entered(self, block: Block, tenant: str) -> None:
        """The tenant published the block, under a lease."""
        self._tenants[block] = tenant
        self.published[tenant] += 1

    def released(self, block: Block) -> None:
        """Nobody leases it any more."""
        self._idle.setdefault(self._tenants[block], {})[block] = None

    def leased(self, block: Block) -> None:
        """It is not idle any more."""
        del self._idle[self._tenants[block]][block]

    def left(self, block: Block) -> None:
        """An idle block is gone."""
        self.leased(block)
        tenant = self._tenants.pop(block)
        self.published[tenant] -= 1
        if not self.published[tenant]:
            del self.published[tenant], self._idle[tenant]

    def stats(self) -> tuple[TenantStats, ...]:
        tenants = sorted(self.published.keys() | self.limits.keys())
        return tuple(TenantStats(tenant, self.published[tenant], self.limits.get(tenant)) for tenant in tenants)

    def problems(self, published: Iterable[Block], idle: Iterable[Block]) -> Iterator[str]:
        """Each broken invariant, in words."""
        if self._tenants.keys() != set(published) or Counter(self._tenants.values()) != +self.published:
            yield f"tenants have published {dict(self.published)}, {len(self._tenants)} blocks"
        if Counter(block for blocks in self._idle.values() for block in blocks) != Counter(list(idle)):
            yield "the tenants' idle blocks are not those of the eviction order"
