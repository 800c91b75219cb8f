"""What a node reports of its transports and its tenants, for metrics and for people."""

from __future__ import annotations

from msgspec import Struct


class TransportUsage(Struct, frozen=True):
    """One transport of a node, counted since its start: transfers that this node asked for.

    `queued` wait or are under way now.
    """

    name: str
    bytes: int = 0
    transfers: int = 0
    failures: int = 0
    retries: int = 0
    seconds: float = 0.0
    queued: int = 0


class TenantUsage(Struct, frozen=True):
    """Blocks of one tenant in a node's DRAM now, and how many it may have (None: no quota)."""

    tenant: str
    blocks: int
    quota: int | None = None
