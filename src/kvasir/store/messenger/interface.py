"""What is known of another node's arena."""

from __future__ import annotations

from msgspec import Struct


class PeerArena(Struct, frozen=True):
    """The arena of `node` in one incarnation of its pool, which `id` names."""

    node: str
    id: bytes
