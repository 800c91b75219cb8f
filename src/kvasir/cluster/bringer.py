"""Brings blocks to a node's DRAM: from its SSD, from other nodes' pools, and hand-offs from there.

Whatever is brought is written into slots that the pool itself reserved, as owner MESSENGER, and published when it is complete
and confirmed. Nobody else can get those slots meanwhile, whoever dies. A read from another node counts only if its pool
confirms, when the lease is given back, that it was held all the time: slots that were reused under the reader give no block.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from itertools import count
from typing import Any, Protocol

import structlog

from kvasir.cluster.peers import Peer, Peers
from kvasir.cluster.pool_host import MESSENGER, MESSENGER_EPOCH, PoolHost
from kvasir.cluster.pool_messages import BringBlocks, ReceiveLease
from kvasir.core.errors import ClusterError, KvasirError
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import (
    AdoptLease,
    KeyedSlot,
    LeaseBlocks,
    Leased,
    LoadDone,
    Loaded,
    Loading,
    LoadStart,
    OfferLease,
    PutEnd,
    PutRevoke,
    PutStart,
    Refused,
    ReleaseLease,
    Reserved,
)
from kvasir.store.messenger.interface import PeerArena

READ_S = 20.0
"""No read from another node takes longer; beyond, it is given up."""

ROOM_S = 5.0
"""How long a hand-off waits for slots in a full pool."""

ROOM_PAUSE_S = 0.05

OFFER_S = 5.0
"""How long what was received waits for the instance that asked; it is taken in the same turn."""

HAND_OFF, FETCH, COPY = 0, 1, 2
"""Whose bytes go first: a request that waits for its next token, for its first, nobody."""

Pairs = Sequence[tuple[int, int]]
"""(slot there, slot here) of each block."""


class Mover(Protocol):
    """Moves bytes between arenas. After `read` has returned or raised, nothing writes into the slots here any more."""

    async def read(self, peer: PeerArena, pairs: Pairs, *, within_s: float, priority: int) -> None:
        """Raises ClusterError when the bytes did not come, in full and in time."""
        ...


class Disk(Protocol):
    """The bytes of the SSD tier. After `read` has returned, nothing writes into the slots any more."""

    async def read(self, blocks: Sequence[tuple[int, BlockKey, int]]) -> tuple[int, ...]:
        """Read (ssd slot, key, slot) each; the ssd slots whose block is not what it should be."""
        ...


class Bringer:
    """Takes what costs the pool's body time. A node that others cannot reach has no `mover`, one without an SSD no `disk`."""

    def __init__(self, host: PoolHost, peers: Peers, mover: Mover | None, disk: Disk | None, tasks: asyncio.TaskGroup):
        self._host = host
        self._peers = peers
        self._mover = mover
        self._disk = disk
        self._tasks = tasks
        self._numbers = count(1)
        self._under_way: dict[BlockKey, asyncio.Future[None]] = {}  # by the first block that is being brought
        self._log = structlog.get_logger().bind(part="bringer", node=peers.me)

    async def bring(self, want: BringBlocks) -> Leased | Refused:
        """Wait `within_s` for the planned prefix, then lease what is there; what comes later is for others."""
        lease = f"bring#{next(self._numbers)}"
        task = self._tasks.create_task(self._fill(lease, want.keys[: want.blocks], want.source, FETCH))
        await asyncio.wait({task}, timeout=want.within_s)
        answer = self._host.ask(LeaseBlocks(want.owner, want.epoch, want.lease, want.keys))
        if task.done():
            self._release(lease)
        else:
            self._log.debug("late, computing instead", lease=want.lease)
            task.add_done_callback(lambda _: self._release(lease))
        assert isinstance(answer, Leased | Refused), answer
        return answer

    async def receive(self, want: ReceiveLease) -> Leased | Refused:
        """Bring a hand-off that is on offer elsewhere, put it on offer here, and take it over for the one that asked."""
        try:
            await self._receive(want)
        except KvasirError as error:
            return Refused("unknown_lease", f"hand-off from {want.source}: {error}")
        answer = self._host.ask(AdoptLease(want.owner, want.epoch, want.lease))
        if isinstance(answer, Refused):
            self._release(want.lease)
        assert isinstance(answer, Leased | Refused), answer
        return answer

    async def copy(self, source: str, keys: tuple[BlockKey, ...]) -> None:
        """Make this node another holder of a hot prefix."""
        lease = f"copy#{next(self._numbers)}"
        await self._fill(lease, keys, source, COPY)
        self._release(lease)

    # --- blocks ------------------------------------------------------------------------------------------------

    async def _fill(self, lease: str, keys: tuple[BlockKey, ...], source: str | None, priority: int) -> None:
        """Bring what DRAM lacks of `keys`, under a lease of ours; as much as can be had.

        Of several that want the same block, one brings it and the others start again from what is there then.
        """
        while True:
            leased = self._host.handle(LeaseBlocks(MESSENGER, MESSENGER_EPOCH, lease, keys))
            assert isinstance(leased, Leased), leased
            missing = keys[len(leased.slots) :]
            if not missing or (other := self._under_way.get(missing[0])) is None:
                break
            self._release(lease)
            await asyncio.wait({other}, timeout=READ_S)
        if not missing:
            return
        mine = self._under_way[missing[0]] = asyncio.get_running_loop().create_future()
        try:
            await self._bring_missing(lease, missing, leased.on_ssd, source, priority)
        finally:
            del self._under_way[missing[0]]
            mine.set_result(None)

    async def _bring_missing(
        self, lease: str, keys: tuple[BlockKey, ...], on_ssd: int, source: str | None, priority: int
    ) -> None:
        loaded = await self._load(lease, keys[:on_ssd]) if on_ssd else 0
        if source is not None and loaded < len(keys):
            await self._fetch(lease, keys[loaded:], source, priority)

    async def _load(self, lease: str, keys: tuple[BlockKey, ...]) -> int:
        """Read blocks from the SSD; how many were good."""
        assert self._disk is not None, "what is on the SSD was read from one"
        loading = self._host.handle(LoadStart(MESSENGER, MESSENGER_EPOCH, lease, keys))
        if not isinstance(loading, Loading) or not loading.slots:
            return 0
        failed = loading.ssd_slots
        try:
            failed = await self._disk.read(list(zip(loading.ssd_slots, keys, loading.slots, strict=False)))
        finally:
            loaded = self._host.handle(LoadDone(MESSENGER, MESSENGER_EPOCH, lease, failed))
        if not isinstance(loaded, Loaded):
            return 0
        self._publish(lease, keys, loaded.slots)
        return len(loaded.slots)

    async def _fetch(self, lease: str, keys: tuple[BlockKey, ...], source: str, priority: int) -> None:
        """Read blocks from another node, as far as it still has them and there is room here."""
        slots: tuple[int, ...] = ()
        good = 0
        there = f"{lease}<{self._peers.me}"
        try:
            peer = self._peers.get(source)
            async with _lent(peer, there, peer.lease(there, keys)) as lent:
                slots = self._reserve(len(lent))
                await self._read(peer, list(zip(lent, slots, strict=False)), priority)
            good = len(slots)
        except KvasirError as error:
            self._log.warning("fetch failed", source=source, blocks=len(keys), error=str(error))
        finally:
            self._publish(lease, keys, slots[:good])
            self._revoke(slots[good:])

    async def _receive(self, want: ReceiveLease) -> None:
        """A hand-off, with its partly filled last block; what of it is here already is not moved."""
        lease, peer = want.lease, self._peers.get(want.source)
        own = self._host.handle(LeaseBlocks(MESSENGER, MESSENGER_EPOCH, lease, want.keys))
        if not isinstance(own, Leased):
            raise ClusterError(f"cannot open lease {lease!r} here: {own}")
        num_own, slots = len(own.slots), tuple[int, ...]()
        try:
            async with _lent(peer, lease, peer.adopt(lease)) as lent:
                if len(lent) != want.count:
                    raise ClusterError(f"expected {want.count} blocks, got {len(lent)}")
                slots = await self._room(want.count - num_own)
                await self._read(peer, list(zip(lent[num_own:], slots, strict=True)), HAND_OFF)
        except BaseException:
            self._revoke(slots)
            self._release(lease)
            raise
        num_full = len(want.keys) - num_own
        self._publish(lease, want.keys[num_own:], slots[:num_full])
        deadline_s = asyncio.get_running_loop().time() + OFFER_S
        self._host.handle(OfferLease(MESSENGER, MESSENGER_EPOCH, lease, slots[num_full:], deadline_s))

    async def _read(self, peer: Peer, pairs: Pairs, priority: int) -> None:
        if self._mover is None:
            raise ClusterError(f"{self._peers.me} exchanges no blocks with other nodes: it was started without an address")
        if pairs:
            await self._mover.read(peer.arena, pairs, within_s=READ_S, priority=priority)

    # --- slots -------------------------------------------------------------------------------------------------

    def _reserve(self, number: int) -> tuple[int, ...]:
        """Up to so many slots."""
        answer = self._host.handle(PutStart(MESSENGER, MESSENGER_EPOCH, number))
        return answer.slots if isinstance(answer, Reserved) else ()

    async def _room(self, number: int) -> tuple[int, ...]:
        """All so many slots; raises ClusterError when the pool is full for long."""
        deadline_s = asyncio.get_running_loop().time() + ROOM_S
        while True:
            slots = self._reserve(number)
            if len(slots) == number:
                return slots
            self._revoke(slots)
            if asyncio.get_running_loop().time() >= deadline_s:
                raise ClusterError(f"no room for {number} blocks within {ROOM_S:g} s; give the node more --dram")
            await asyncio.sleep(ROOM_PAUSE_S)

    def _publish(self, lease: str, keys: Sequence[BlockKey], slots: Sequence[int]) -> None:
        if slots:
            blocks = tuple([KeyedSlot(key, slot) for key, slot in zip(keys, slots, strict=False)])
            self._host.handle(PutEnd(MESSENGER, MESSENGER_EPOCH, lease, blocks))

    def _revoke(self, slots: tuple[int, ...]) -> None:
        if slots:
            self._host.handle(PutRevoke(MESSENGER, MESSENGER_EPOCH, slots))

    def _release(self, lease: str) -> None:
        self._host.handle(ReleaseLease(MESSENGER, MESSENGER_EPOCH, lease))


@contextlib.asynccontextmanager
async def _lent(peer: Peer, lease: str, call: Coroutine[Any, Any, tuple[int, ...]]) -> Any:
    """Slots of another node's pool, as long as they are lent. Leaving raises unless they were, all the time."""
    try:
        yield await call
    except BaseException:
        with contextlib.suppress(KvasirError):
            await asyncio.shield(peer.give_back(lease))
        raise
    await peer.give_back(lease)
