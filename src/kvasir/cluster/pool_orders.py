"""An operator's orders, carried out by a pool."""

from __future__ import annotations

from kvasir.cluster.messages import OrderDone
from kvasir.cluster.orders import ClearCache, Order
from kvasir.cluster.pool_host import HUB, HUB_EPOCH, PoolHost
from kvasir.core.pool_events import Clear


def carry_out(order: Order, host: PoolHost, node: str) -> OrderDone:
    """Do it, and say how many blocks it was about."""
    match order:
        case ClearCache():
            before = host.node.stats()
            host.handle(Clear(HUB, HUB_EPOCH))
            after = host.node.stats()
            gone = before.published - after.published + before.ssd_published - after.ssd_published
            return OrderDone(node, order.id, gone)
        case _:
            return OrderDone(node, order.id, error=f"this pool cannot carry out {type(order).__name__}")
