"""One pool's way to the pools of other nodes: it asks them for leases as any owner does, and knows where their bytes are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import structlog

from kvasir.cluster.messages import PeerPool
from kvasir.cluster.names import pool_name
from kvasir.cluster.pool_client import ChannelLink, PoolCaller
from kvasir.cluster.pool_messages import PoolCall, PoolReply
from kvasir.cluster.wire import Channel, ZmqChannel
from kvasir.core.errors import ClusterError
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import LeaseBlocks, OwnerJoined, ReleaseLease
from kvasir.store.messenger.topology import Place, Topology
from kvasir.store.messenger.transport import PeerArena

PEER_TIMEOUT_S = 2.0
"""A pool on another node answers within milliseconds; one that is silent for so long is taken to be lost."""

OpenChannel = Callable[[str, str], Channel[PoolReply, PoolCall]]
"""(control address, own name) → a channel to that pool."""


def tcp_channel(control: str, me: str) -> Channel[PoolReply, PoolCall]:
    """To a pool's process, wherever it is."""
    return ZmqChannel(control, me, msgspec.msgpack.Decoder(PoolReply))


class Peer:
    """Another node's pool. Every call raises PoolError when it is refused and DeadlineExceeded when nobody answers."""

    def __init__(self, found: PeerPool, link: ChannelLink, me: str, epoch: int):
        self.found = found
        self._link = link
        self._pool = PoolCaller(me, epoch, link, asyncio.get_running_loop().time)
        self._me = me
        self._epoch = epoch

    @property
    def arena(self) -> PeerArena:
        return self.found.arena

    async def lease(self, lease: str, keys: tuple[BlockKey, ...]) -> tuple[int, ...]:
        """Slots there, of the longest prefix of `keys` that it holds in DRAM."""
        return await self._pool.open(LeaseBlocks(self._me, self._epoch, lease, keys, is_lookup=False))

    async def adopt(self, lease: str) -> tuple[int, ...]:
        """Take a hand-off over; all its slots there, in order."""
        return await self._pool.adopt(lease)

    async def give_back(self, lease: str) -> None:
        """Close a lease. Returns only if that incarnation of the pool has known us all the time: what was read is right."""
        await self._link.call(ReleaseLease(self._me, self._epoch, lease))

    async def run(self) -> None:
        """Introduce this pool, then read answers for as long as the peer is used."""
        self._link.tell(OwnerJoined(self._me, self._epoch))
        await self._link.read()


class Peers:
    """The pools of all other nodes, as the hub names them."""

    def __init__(self, node: str, epoch: int, open_channel: OpenChannel, tasks: asyncio.TaskGroup):
        self.me = pool_name(node)
        self._node = node
        self._topology = Topology()
        self._epoch = epoch
        self._open_channel = open_channel
        self._tasks = tasks
        self._peers: dict[str, Peer] = {}
        self._running: dict[str, tuple[asyncio.Task[None], Channel[PoolReply, PoolCall]]] = {}
        self._log = structlog.get_logger().bind(part="peers", node=node)

    def get(self, node: str) -> Peer:
        """Raises ClusterError for a node that is not there."""
        if node not in self._peers:
            raise ClusterError(f"node {node} is not reachable from {self.me}")
        return self._peers[node]

    def nearest_first(self, nodes: tuple[str, ...]) -> list[str]:
        """Those that can be reached: of the same machine, then by the speed of the links, then of the same rack."""
        return self._topology.nearest_first(self._node, [node for node in nodes if node in self._peers])

    def update(self, found: tuple[PeerPool, ...]) -> None:
        """Open channels to new ones, close those to who is gone or has started again."""
        now = {peer.node: peer for peer in found if peer.node != self._node}
        self._topology = Topology({peer.node: Place(peer.arena.host, peer.rack, peer.link_bytes_s) for peer in found})
        for node, peer in list(self._peers.items()):
            if now.get(node) != peer.found:
                self._close(node)
        for node, peer_pool in now.items():
            if node not in self._peers:
                self._open(peer_pool)

    def close(self) -> None:
        for node in list(self._peers):
            self._close(node)

    def _open(self, found: PeerPool) -> None:
        channel = self._open_channel(found.control, self.me)
        peer = self._peers[found.node] = Peer(found, ChannelLink(channel, PEER_TIMEOUT_S), self.me, self._epoch)
        self._running[found.node] = self._tasks.create_task(peer.run()), channel
        self._log.info("peer joined", peer=found.node)

    def _close(self, node: str) -> None:
        del self._peers[node]
        task, channel = self._running.pop(node)
        task.cancel()
        channel.close()
        self._log.info("peer left", peer=node)
