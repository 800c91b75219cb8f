"""Whose block is whose: how many each tenant has published, how many it may, and which of them are idle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from kvasir.core.pool_events import TenantStats


class Quotas:
    """Slots by tenant. A tenant without a quota is counted only."""

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}
        self.published: Counter[str] = Counter()
        self._tenants: dict[int, str] = {}
        self._idle: dict[str, dict[int, None]] = {}  # by tenant, an ordered set: least recently used first

    def room(self, tenant: str) -> int | None:
        """How many more blocks the tenant may publish; None is any number."""
        limit = self.limits.get(tenant)
        return None if limit is None else max(0, limit - self.published[tenant])

    def idle(self, tenant: str) -> Iterable[int]:
        return self._idle.get(tenant, ())

    def entered(self, slot: int, tenant: str) -> None:
        """The tenant published a block there, under a lease."""
        self._tenants[slot] = tenant
        self.published[tenant] += 1

    def released(self, slot: int) -> None:
        """Nobody leases it any more."""
        self._idle.setdefault(self._tenants[slot], {})[slot] = None

    def leased(self, slot: int) -> None:
        """It is not idle any more."""
        del self._idle[self._tenants[slot]][slot]

    def left(self, slot: int) -> None:
        """An idle block is gone."""
        self.leased(slot)
        tenant = self._tenants.pop(slot)
        self.published[tenant] -= 1
        if not self.published[tenant]:
            del self.published[tenant], self._idle[tenant]

    def stats(self) -> tuple[TenantStats, ...]:
        tenants = sorted(self.published.keys() | self.limits.keys())
        return tuple(TenantStats(tenant, self.published[tenant], self.limits.get(tenant)) for tenant in tenants)

    def problems(self, published: Iterable[int], idle: Iterable[int]) -> Iterator[str]:
        """Each broken invariant, in words."""
        if self._tenants.keys() != set(published) or Counter(self._tenants.values()) != +self.published:
            yield f"tenants have published {dict(self.published)}, in {len(self._tenants)} slots"
        if sorted(slot for slots in self._idle.values() for slot in slots) != sorted(idle):
            yield "the tenants' idle blocks are not those of the eviction order"
