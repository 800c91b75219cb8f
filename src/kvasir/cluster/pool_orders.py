"""An operator's orders, carried out by a pool."""

from __future__ import annotations

from kvasir.cluster.messages import OrderDone
from kvasir.cluster.orders import AnyOrder, ClearCache, PinBlocks, SetTenantQuota, UnpinBlocks
from kvasir.cluster.pool_host import HUB, HUB_EPOCH, PoolHost
from kvasir.core.pool_events import Clear, Pin, Pinned, PoolEvent, Priority, Refused, SetQuota, Unpin

PRIORITIES = {"low": Priority.LOW, "normal": Priority.NORMAL, "high": Priority.HIGH}


def carry_out(order: AnyOrder, host: PoolHost, node: str, now: float) -> OrderDone:
    """Do it, and say how many blocks it was about: forgotten or pinned ones. `now` is of the pool's own clock."""
    before = _readable(host)
    answer = host.handle(_event(order, now))
    match answer:
        case Refused(message=message):
            return OrderDone(node, order.id, error=message)
        case Pinned(num_blocks=num_blocks):
            return OrderDone(node, order.id, num_blocks)
        case _:
            return OrderDone(node, order.id, before - _readable(host))


def _event(order: AnyOrder, now: float) -> PoolEvent:
    match order:
        case ClearCache():
            return Clear(HUB, HUB_EPOCH)
        case PinBlocks(keys=keys, ttl_s=ttl_s, priority=priority):
            return Pin(HUB, HUB_EPOCH, keys, now + ttl_s, PRIORITIES[priority])
        case UnpinBlocks(keys=keys):
            return Unpin(HUB, HUB_EPOCH, keys)
        case SetTenantQuota(tenant=tenant, blocks=blocks):
            return SetQuota(HUB, HUB_EPOCH, tenant, blocks)


def _readable(host: PoolHost) -> int:
    stats = host.node.stats()
    return stats.published + stats.ssd_published
