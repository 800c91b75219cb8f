"""Under which names nodes and processes are known."""

from __future__ import annotations

HEAD = "node0"
"""The node that the hub and the gateway run on."""


def pool_name(node: str) -> str:
    """A node's pool process."""
    return f"pool@{node}"


def instance_name(role: str, number: int, node: str) -> str:
    """`prefill-0` on the head node, `prefill-0@node1` elsewhere."""
    return f"{role}-{number}" if node == HEAD else f"{role}-{number}@{node}"
