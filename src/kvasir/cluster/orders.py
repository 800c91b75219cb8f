"""What an operator wants of a pool, on its way from the hub. Times are durations: clocks of two machines differ."""

from __future__ import annotations

from kvasir.cluster.messages import Message
from kvasir.core.keys import BlockKey


class ClearCache(Message, frozen=True):
    """Forget every block that no request holds, in DRAM and on the SSD."""


class PinBlocks(Message, frozen=True):
    """Keep these blocks, a prefix in order, for `ttl_s` from now."""

    keys: tuple[BlockKey, ...]
    ttl_s: float
    priority: int


class UnpinBlocks(Message, frozen=True):
    """Let these blocks be evicted again."""

    keys: tuple[BlockKey, ...]


class SetTenantQuota(Message, frozen=True):
    """The tenant may have so many blocks in the node's DRAM; None: as many as it likes."""

    tenant: str
    blocks: int | None


Order = ClearCache | PinBlocks | UnpinBlocks | SetTenantQuota
