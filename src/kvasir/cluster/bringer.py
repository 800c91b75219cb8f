"""Brings blocks to a node's DRAM: from its SSD, from other nodes' pools, and hand-offs from there.

Whatever is brought is written into slots that the pool itself reserved, as owner MESSENGER, and published when it is complete
and confirmed. Nobody else can get those slots meanwhile, whoever dies. A read from another node counts only if its pool
confirms, when the lease is given back, that it was held all the time: slots that were reused under the reader give no block.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import count, zip_longest
from typing import Any, Protocol

import structlog

from kvasir.cluster.peers import Peer, Peers
from kvasir.cluster.pool_host import MESSENGER, MESSENGER_EPOCH, PoolHost
from kvasir.cluster.pool_messages import BringBlocks, CopyBlocks, ReceiveLease
from kvasir.core.errors import ClusterError, KvasirError
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import (
    AdoptLease,
    FetchDone,
    Fetching,
    FetchStart,
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
from kvasir.engine.landing import LOST
from kvasir.store.messenger.transport import PeerArena, Priority

READ_S = 20.0
"""No read from another node takes longer; beyond, it is given up."""

ROOM_S = 5.0
"""How long a hand-off waits for slots in a full pool."""

ROOM_PAUSE_S = 0.05

OFFER_S = 5.0
"""How long what was received waits for the instance that asked; it is taken in the same turn."""

Pairs = Sequence[tuple[int, int]]
"""(slot there, slot here) of each block."""


class Mover(Protocol):
    """Moves bytes between arenas. After `read` has returned or raised, nothing writes into the slots here any more."""

    async def read(
        self,
        peer: PeerArena,
        pairs: Pairs,
        *,
        within_s: float,
        priority: Priority,
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        """`pairs` are not empty. Raises ClusterError when the bytes did not come, in full and in time.

        With `on_layer`, the first layer of all pairs comes first, then the second ...; it hears how many have come.
        """
        ...


class Disk(Protocol):
    """The bytes of the SSD tier. After `read` has returned, nothing writes into the slots any more."""

    async def read(self, blocks: Sequence[tuple[int, BlockKey, int]]) -> tuple[int, ...]:
        """Read (ssd slot, key, slot) each; the ssd slots whose block is not what it should be."""
        ...


@dataclass(slots=True, eq=False)
class _Filling:
    """One prefix on its way: under `lease`, a lease of ours, `there` were here and `coming` are being written."""

    lease: str
    keys: tuple[BlockKey, ...]
    tenant: str = ""
    there: tuple[int, ...] = ()
    coming: tuple[int, ...] = ()
    started_s: float = 0.0
    layers: int = 0
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    is_fetching: bool = False
    wanted: BringBlocks | None = None  # who computes on it already
    is_lost: bool = False  # and is to notice that it never came, before the slots are given to others

    def left_s(self, num_layers: int, now: float) -> float:
        """Predicted from the layers that have come."""
        return (now - self.started_s) * (num_layers - self.layers) / self.layers if self.layers else math.inf


class Bringer:
    """Takes what costs the pool's body time. A node that others cannot reach has no `mover`, one without an SSD no `disk`."""

    def __init__(
        self,
        host: PoolHost,
        peers: Peers,
        *,
        mover: Mover | None,
        disk: Disk | None,
        num_layers: int,
        tasks: asyncio.TaskGroup,
    ):
        self._host = host
        self._peers = peers
        self._mover = mover
        self._disk = disk
        self._num_layers = num_layers
        self._tasks = tasks
        self._numbers = count(1)
        self._clock = asyncio.get_running_loop().time
        self._under_way: dict[BlockKey, asyncio.Future[None]] = {}  # by the first block that is being brought
        self._landing: dict[str, _Filling] = {}  # by the lease of whoever computes on it
        self._log = structlog.get_logger().bind(part="bringer", node=peers.me)

    async def bring(self, want: BringBlocks) -> Leased | Refused:
        """Wait `within_s` for the planned prefix, then lease what is there; what comes later is for others."""
        filling = _Filling(f"bring#{next(self._numbers)}", want.keys[: want.blocks], want.tenant)
        task = self._tasks.create_task(self._fill(filling, want.sources, Priority.FETCH))
        give_up = self._clock() + want.within_s
        while not task.done() and (left_s := give_up - self._clock()) > 0.0:
            if filling.left_s(self._num_layers, self._clock()) <= want.hidden_s:
                return self._promise(want, filling, task)
            filling.moved.clear()
            moved = asyncio.ensure_future(filling.moved.wait())
            await asyncio.wait({task, moved}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            moved.cancel()
        answer = self._host.ask(LeaseBlocks(want.owner, want.epoch, want.lease, want.keys, want.tenant))
        self._release_after(task, filling)
        assert isinstance(answer, Leased | Refused), answer
        return answer

    def let_go(self, owner: str, lease: str | None = None) -> None:
        """The owner has released a lease, or (None) is gone: what was promised to it is nobody's."""
        for name, filling in list(self._landing.items()):
            want = filling.wanted
            if want is not None and want.owner == owner and lease in (name, None):
                del self._landing[name]
                filling.wanted = None
                if filling.is_lost:
                    self._end_fetch(filling, 0)
                    self._release(filling.lease)

    def _promise(self, want: BringBlocks, filling: _Filling, task: asyncio.Task[None]) -> Leased:
        """The last layers will be here when they are needed: the lease is opened when they are (`_keep_promise`)."""
        filling.wanted = want
        self._landing[want.lease] = filling
        self._release_after(task, filling)
        return Leased(want.lease, filling.there + filling.coming)

    def _keep_promise(self, filling: _Filling, *, has_come: bool) -> None:
        """Called in the turn in which the blocks were published, or it was clear that they will not be.

        What is lost is marked so before the rest is marked complete: whoever computes may look in between.
        """
        want, missing = filling.wanted, self._host.arena.missing
        lost = [] if want is None else self._broken(want, filling) if has_come else list(filling.coming)
        if lost:
            filling.is_lost = True
        elif want is not None:
            filling.wanted = None
            self._landing.pop(want.lease)
        missing[lost] = LOST
        missing[[slot for slot in filling.coming if slot not in lost]] = 0

    def _broken(self, want: BringBlocks, filling: _Filling) -> list[int]:
        """Open the promised lease; the slots that it should have and has not. None are missed by an owner that is gone.

        Another copy came first, or a quota is full: then whoever computes reads ours, which nobody keeps.
        """
        slots = filling.there + filling.coming
        leased = self._host.ask(LeaseBlocks(want.owner, want.epoch, want.lease, want.keys[: len(slots)], want.tenant))
        if not isinstance(leased, Leased) or leased.slots == slots:
            return []
        self._host.handle(ReleaseLease(want.owner, want.epoch, want.lease))
        return [slot for slot, first in zip_longest(slots, leased.slots) if slot != first]

    def _release_after(self, task: asyncio.Task[None], filling: _Filling) -> None:
        if task.done():
            self._release(filling.lease)
            return
        task.add_done_callback(lambda _: None if filling.is_lost else self._release(filling.lease))

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

    async def copy(self, want: CopyBlocks) -> None:
        """Make this node another holder of a prefix."""
        filling = _Filling(f"copy#{next(self._numbers)}", want.keys, want.tenant)
        await self._fill(filling, (want.source,), want.priority)
        self._release(filling.lease)

    # --- blocks ------------------------------------------------------------------------------------------------

    async def _fill(self, filling: _Filling, sources: tuple[str, ...], priority: Priority) -> None:
        """Bring what DRAM lacks of its keys; as much as can be had."""
        lease, keys = filling.lease, filling.keys
        leased = await self._lease(lease, keys, filling.tenant)
        missing = keys[len(leased.slots) :]
        if not missing:
            return
        filling.there = leased.slots
        mine = self._under_way[missing[0]] = asyncio.get_running_loop().create_future()
        try:
            if leased.on_ssd:
                filling.there += await self._load(lease, missing[: leased.on_ssd])
            for source in self._peers.nearest_first(sources):
                if len(filling.there) < len(keys) and not filling.is_lost:
                    await self._fetch(filling, source, priority)
        finally:
            del self._under_way[missing[0]]
            mine.set_result(None)

    async def _load(self, lease: str, keys: tuple[BlockKey, ...]) -> tuple[int, ...]:
        """Read blocks from the SSD; the slots of those that were good."""
        assert self._disk is not None, "what is on the SSD was read from one"
        loading = self._host.handle(LoadStart(MESSENGER, MESSENGER_EPOCH, lease, keys))
        if not isinstance(loading, Loading) or not loading.slots:
            return ()
        failed = await self._disk.read(list(zip(loading.ssd_slots, keys, loading.slots, strict=False)))
        loaded = self._host.handle(LoadDone(MESSENGER, MESSENGER_EPOCH, lease, failed))
        if not isinstance(loaded, Loaded):
            return ()
        self._publish(lease, keys, loaded.slots)
        return loaded.slots

    async def _fetch(self, filling: _Filling, source: str, priority: Priority) -> None:
        """Read blocks from another node, as far as it still has them and there is room here."""
        keys = filling.keys[len(filling.there) :]
        remote, has_come = f"{filling.lease}<{self._peers.me}", False
        try:
            peer = self._peers.get(source)
            async with _lent(peer, remote, peer.lease(remote, keys)) as lent:
                filling.coming = self._start_fetch(filling.lease, len(lent))
                filling.is_fetching = True
                self._host.arena.missing[list(filling.coming)] = self._num_layers
                filling.started_s = self._clock()
                pairs = list(zip(lent, filling.coming, strict=False))
                await self._read(peer, pairs, priority, lambda layers: self._layer_came(filling, layers))
            has_come = True
        except KvasirError as error:
            self._log.warning("fetch failed", source=source, blocks=len(keys), error=str(error))
        finally:
            if has_come:
                self._end_fetch(filling, len(filling.coming))
                self._publish(filling.lease, keys, filling.coming)
            self._keep_promise(filling, has_come=has_come)
            if not has_come and not filling.is_lost:
                self._end_fetch(filling, 0)
            if not filling.is_lost:
                filling.there += filling.coming if has_come else ()
                filling.coming, filling.layers = (), 0

    def _layer_came(self, filling: _Filling, layers: int) -> None:
        """The last one is held back until the source has confirmed that all of them are right."""
        filling.layers = layers
        self._host.arena.missing[list(filling.coming)] = max(1, self._num_layers - layers)
        filling.moved.set()

    async def _receive(self, want: ReceiveLease) -> None:
        """A hand-off, with its partly filled last block; what of it is here already is not moved."""
        lease, peer = want.lease, self._peers.get(want.source)
        own = await self._lease(lease, want.keys, want.tenant)
        num_own, slots = len(own.slots), tuple[int, ...]()
        try:
            async with _lent(peer, lease, peer.adopt(lease)) as lent:
                if len(lent) != want.count:
                    raise ClusterError(f"expected {want.count} blocks, got {len(lent)}")
                slots = await self._room(want.count - num_own)
                await self._read(peer, list(zip(lent[num_own:], slots, strict=True)), Priority.HAND_OFF)
        except BaseException:
            self._revoke(slots)
            self._release(lease)
            raise
        num_full = len(want.keys) - num_own
        self._publish(lease, want.keys[num_own:], slots[:num_full])
        deadline_s = self._clock() + OFFER_S
        self._host.handle(OfferLease(MESSENGER, MESSENGER_EPOCH, lease, slots[num_full:], deadline_s))

    async def _read(self, peer: Peer, pairs: Pairs, priority: Priority, on_layer: Callable[[int], None] | None = None) -> None:
        if self._mover is None:
            raise ClusterError(f"{self._peers.me} exchanges no blocks with other nodes: it was started without an address")
        if pairs:
            await self._mover.read(peer.arena, pairs, within_s=READ_S, priority=priority, on_layer=on_layer)

    def _start_fetch(self, lease: str, number: int) -> tuple[int, ...]:
        """Up to so many slots, which nobody else gets before `_end_fetch`."""
        answer = self._host.handle(FetchStart(MESSENGER, MESSENGER_EPOCH, lease, number))
        return answer.slots if isinstance(answer, Fetching) else ()

    def _end_fetch(self, filling: _Filling, num_good: int) -> None:
        """Nothing writes into the slots any more; the first `num_good` are ours to publish, the others are free. Once only."""
        if filling.coming and filling.is_fetching:
            filling.is_fetching = False
            self._host.handle(FetchDone(MESSENGER, MESSENGER_EPOCH, filling.lease, num_good))

    async def _lease(self, lease: str, keys: tuple[BlockKey, ...], tenant: str) -> Leased:
        """One of our own, on behalf of a request that looks itself. Raises ClusterError when it is open already.

        Of several that want the same block, one brings it and the others start again from what is there then.
        """
        event = LeaseBlocks(MESSENGER, MESSENGER_EPOCH, lease, keys, tenant, is_lookup=False)
        while True:
            leased = self._host.ask(event)
            if not isinstance(leased, Leased):
                raise ClusterError(f"cannot open lease {lease!r} here: {leased}")
            missing = keys[len(leased.slots) :]
            if not missing or (other := self._under_way.get(missing[0])) is None:
                return leased
            self._release(lease)
            await asyncio.wait({other}, timeout=READ_S)

    # --- slots -------------------------------------------------------------------------------------------------

    def _reserve(self, number: int) -> tuple[int, ...]:
        """Up to so many slots."""
        answer = self._host.handle(PutStart(MESSENGER, MESSENGER_EPOCH, number))
        return answer.slots if isinstance(answer, Reserved) else ()

    async def _room(self, number: int) -> tuple[int, ...]:
        """All so many slots; raises ClusterError when the pool is full for long."""
        deadline_s = self._clock() + ROOM_S
        while True:
            slots = self._reserve(number)
            if len(slots) == number:
                return slots
            self._revoke(slots)
            if self._clock() >= deadline_s:
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
