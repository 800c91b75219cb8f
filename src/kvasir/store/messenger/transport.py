"""What a transport is: something that reads spans of another node's arena into this node's.

**Pull only.** The receiver reserves its own slots and reads under a lease that the source granted. A late write into another
node's memory could hit a slot that belongs to somebody else by then; a late read is merely thrown away. Who leases what is
settled by the caller, over its own control plane: a read counts only if the source says, after the read, that the lease was
held throughout by the same incarnation of its arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from kvasir.store.arena import ArenaHandle
from kvasir.store.messenger.spans import SpanPair


class Priority(IntEnum):
    """Which transfers go first when they share a path; lower is sooner."""

    HAND_OFF = 0
    FETCH = 1
    REPLICATION = 2


class PeerArena(Struct, frozen=True):
    """All that another node needs to read from an arena; it travels with the node's registration.

    `arena.id` is the incarnation. `host` is the identity of the machine (see `host_identity`), `tcp` is HOST:PORT of the node's
    TcpServer, `nixl` is what its NixlTransport says of itself; None where the node has no such path.
    """

    node: str
    arena: ArenaHandle
    host: str
    tcp: str | None = None
    nixl: bytes | None = None


class Transport(Protocol):
    """One way to read. Each instance serves one local arena, on one event loop.

    `read` returns when all bytes of all spans are in the local slots, or raises TransferError; `deadline_s` is a time of the
    event loop's clock. `on_part(n)` is called as the first n spans become complete, n growing; what it raises ends the read.

    **When `read` has returned, raised or been cancelled, nothing writes into its local slots any more.** The caller gives them
    to somebody else then.
    """

    @property
    def name(self) -> str: ...

    def reaches(self, peer: PeerArena) -> bool:
        """Whether there is a path at all; no promise that it works."""
        ...

    async def read(
        self,
        peer: PeerArena,
        spans: Sequence[SpanPair],
        *,
        deadline_s: float,
        priority: Priority = Priority.FETCH,
        on_part: Callable[[int], None] | None = None,
    ) -> None: ...

    async def close(self) -> None: ...


def host_identity() -> str:
    """Equal for processes that can open each other's arenas: the same boot of the same kernel, and the same pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
