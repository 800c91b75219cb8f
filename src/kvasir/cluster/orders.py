"""What an operator wants of a pool, on its way from the hub. Times are durations: clocks of two machines differ."""

from __future__ import annotations

from typing import Literal

from kvasir.cluster.messages import Message
from kvasir.core.keys import BlockKey

PinPriority = Literal["low", "normal", "high"]


class Order(Message, frozen=True):
    """Answered by OrderDone with the same `id`."""

    id: int


class ClearCache(Order, frozen=True):
    """Forget every block that no request holds, in DRAM and on the SSD."""


class PinBlocks(Order, frozen=True):
    """Keep the longest prefix of `keys` that is in DRAM, for `ttl_s` from now, and after that by its priority."""

    keys: tuple[BlockKey, ...]
    ttl_s: float
    priority: PinPriority


class UnpinBlocks(Order, frozen=True):
    """Let these blocks be evicted again."""

    keys: tuple[BlockKey, ...]


class SetTenantQuota(Order, frozen=True):
    """The tenant may have so many blocks in the node's DRAM; None: as many as it likes."""

    tenant: str
    blocks: int | None


AnyOrder = ClearCache | PinBlocks | UnpinBlocks | SetTenantQuota
