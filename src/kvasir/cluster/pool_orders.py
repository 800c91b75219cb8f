"""An operator's orders, carried out by a pool."""

from __future__ import annotations

from kvasir.cluster.messages import OrderDone
from kvasir.cluster.orders import ClearCache, Order, PinBlocks, SetTenantQuota, UnpinBlocks
from kvasir.cluster.pool_host import HUB, HUB_EPOCH, Answer, PoolHost
from kvasir.core.pool_events import Clear, Pin, Pinned, Priority, Refused, SetQuota, Unpin


def carry_out(order: Order, host: PoolHost, node: str) -> OrderDone:
    """Do it, and say how many blocks it was about."""
    match order:
        case ClearCache():
            before = host.node.stats()
            host.handle(Clear(HUB, HUB_EPOCH))
            after = host.node.stats()
            gone = before.published - after.published + before.ssd_published - after.ssd_published
            return OrderDone(node, order.id, gone)
        case PinBlocks(keys=keys, ttl_s=ttl_s, priority=priority):
            pin = Pin(HUB, HUB_EPOCH, keys, host.now + ttl_s, Priority[priority.upper()])
            answer = host.handle(pin)
            return _done(order, node, answer, answer.num_blocks if isinstance(answer, Pinned) else 0)
        case UnpinBlocks(keys=keys):
            return _done(order, node, host.handle(Unpin(HUB, HUB_EPOCH, keys)), len(keys))
        case SetTenantQuota(tenant=tenant, blocks=blocks):
            return _done(order, node, host.handle(SetQuota(HUB, HUB_EPOCH, tenant, blocks)), blocks or 0)
        case _:
            return OrderDone(node, order.id, error=f"this pool cannot carry out {type(order).__name__}")


def _done(order: Order, node: str, answer: Answer, num_blocks: int) -> OrderDone:
    if isinstance(answer, Refused):
        return OrderDone(node, order.id, error=answer.message)
    return OrderDone(node, order.id, num_blocks)
