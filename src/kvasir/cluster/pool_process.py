"""The pool process of one node: owns the arena and the PoolNode, answers the node's instances, tells the hub what is here.

python -m kvasir.cluster.pool_process --config pool.json
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from kvasir.cluster.bringer import Bringer, Disk, Mover
from kvasir.cluster.config import choose
from kvasir.cluster.disk import max_spilling, start_disk
from kvasir.cluster.lifeline import child_config, remove_runtime_directory, run_child
from kvasir.cluster.messages import PeerPool, PoolReport, Shutdown
from kvasir.cluster.mover import MessengerMover
from kvasir.cluster.orders import Order
from kvasir.cluster.peers import OpenChannel, Peers, tcp_channel
from kvasir.cluster.pool_host import PoolHost
from kvasir.cluster.pool_messages import (
    BodyEvent,
    BringBlocks,
    CopyBlocks,
    FromPool,
    OwnerAnswer,
    OwnerEvent,
    PeersChanged,
    PoolCall,
    PoolReply,
    ReceiveLease,
    Resync,
    ToPool,
)
from kvasir.cluster.pool_orders import carry_out
from kvasir.cluster.wire import Channel, Listener, ZmqChannel, ZmqListener, tcp_address
from kvasir.core.errors import ConfigError, KvasirError
from kvasir.core.pool_events import LeaseBlocks, OwnerJoined, OwnerLost, Refused, ReleaseLease
from kvasir.core.units import format_size
from kvasir.core.usage import TenantUsage, TransportUsage
from kvasir.costs.fitted import FittedCost
from kvasir.costs.roofline import RooflineCost
from kvasir.pool.cost_aware import block_seconds
from kvasir.pool.eviction import Eviction
from kvasir.pool.node import PoolNode
from kvasir.pool.policies import EVICTIONS
from kvasir.store.arena import Arena, create_arena
from kvasir.store.messenger import PeerArena, ShmTransport, TcpServer, TcpTransport, Transport, host_identity
from kvasir.store.messenger.messenger import Messenger
from kvasir.store.prefault import Prefault
from kvasir.store.ssd import SsdFile, open_ssd, places_that_fit
from kvasir.telemetry import logs

if TYPE_CHECKING:
    from kvasir.store.messenger.nixl import NixlTransport

BAD_SETUP_EXIT = 2
"""Exit status when the pool cannot start for a reason that a restart does not mend; it has said why in one line."""

REPORT_S = 1.0
TICK_S = 0.1
CHECK_S = 5.0

FLUSH_S = 3.0
"""At an orderly end, how long to wait for blocks that are not on the SSD yet; less than the process is given to end."""

FLUSH_PAUSE_S = 0.02

LOW_FREE, HIGH_FREE = 64, 32
"""With an SSD, one slot in so many is kept free: below the low mark, up to the high one, by what the SSD has too."""

MAX_BRINGING = 64
"""Requests for which blocks are being brought at a time; beyond, what is in place must do."""


class PoolConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`listen` is where instances connect, `hub` where the hub listens, which knows this process as `name`.

    `runtime_directory` is removed at the end when the parent is gone and cannot do it; None leaves it alone. Other nodes
    reach this pool at `advertise` (a host name or address); None: no port is opened. It reads from theirs by `transports`, the
    best first. `identity` names what makes a block's
    bytes what they are; the SSD tier in `ssd_path` holds blocks of no other. Eviction is by name, and by the seconds that
    `costs` says a block takes to compute.
    """

    name: str
    node: str
    listen: str
    hub: str
    num_slots: int
    slot_bytes: int
    block_tokens: int = 64
    num_layers: int = 1
    costs: FittedCost | RooflineCost | None = None
    eviction: str = "lru"
    epoch: int = 1
    runtime_directory: str | None = None
    advertise: str | None = None
    rack: str = ""
    link_bytes_s: float = 0.0
    transports: tuple[str, ...] = ("shm", "tcp")
    identity: str = ""
    ssd_path: str | None = None
    ssd_bytes: int = 0
    log_level: str = "info"
    log_json: bool = False


def _no_transports() -> tuple[TransportUsage, ...]:
    return ()


class PoolBody:
    """Runs until the hub says Shutdown or its task is cancelled."""

    def __init__(
        self,
        host: PoolHost,
        node: str,
        *,
        epoch: int = 1,
        instances: Listener[PoolCall, PoolReply],
        hub: Channel[ToPool, FromPool],
        mover: Mover | None = None,
        usage: Callable[[], tuple[TransportUsage, ...]] = _no_transports,
        disk: Disk | None = None,
        num_layers: int = 1,
        open_channel: OpenChannel = tcp_channel,
    ):
        """Without a `mover` nothing comes from other nodes; without a `disk` there is no SSD."""
        self._host = host
        self._node = node
        self._epoch = epoch
        self._instances = instances
        self._hub = hub
        self._mover = mover
        self._usage = usage
        self._disk = disk
        self._num_layers = num_layers
        self._open_channel = open_channel
        self._num_bringing = 0
        self._awaited: set[tuple[str, str]] = set()  # (instance, lease) of what is being brought and was not given up
        self._flush_due = False
        self._log = structlog.get_logger().bind(part="pool", node=node)
        self.broken_invariants = 0

    async def run(self) -> None:
        self._flush()
        async with asyncio.TaskGroup() as self._tasks:
            self._peers = Peers(self._node, self._epoch, self._open_channel, self._tasks)
            self._bringer = Bringer(
                self._host,
                self._peers,
                mover=self._mover,
                disk=self._disk,
                num_layers=self._num_layers,
                tasks=self._tasks,
            )
            background = [self._tasks.create_task(work()) for work in (self._serve, self._tick, self._report)]
            try:
                await self._obey()
            finally:
                for task in background:
                    task.cancel()
                self._peers.close()

    async def _serve(self) -> None:
        """Answer instances and other pools. An event must carry its sender's own name."""
        while True:
            peer, call = await self._instances.recv()
            event = call.event
            if event.owner != peer:
                self._log.warning("spoke in another's name, ignored", peer=peer, owner=event.owner)
            elif isinstance(event, BringBlocks | ReceiveLease):
                self._awaited.add((peer, event.lease))
                self._tasks.create_task(self._bring(peer, call.id, event))
            else:
                if isinstance(event, ReleaseLease):
                    self._bringer.let_go(peer, event.lease)
                    self._awaited.discard((peer, event.lease))
                elif isinstance(event, OwnerJoined):
                    self._bringer.let_go(peer)
                self._reply(peer, call.id, event, self._host.ask(event))

    async def _bring(self, peer: str, call_id: int | None, event: BringBlocks | ReceiveLease) -> None:
        """In a task of its own. With too many of them under way, what is there must do.

        A lease that was released before it was open is released now: nobody would do it later.
        """
        self._num_bringing += 1
        try:
            answer = await self._brought(event)
        finally:
            self._num_bringing -= 1
        if (peer, event.lease) not in self._awaited:
            self._bringer.let_go(peer, event.lease)
            answer = self._host.ask(ReleaseLease(event.owner, event.epoch, event.lease))
        self._awaited.discard((peer, event.lease))
        self._reply(peer, call_id, event, answer)

    async def _brought(self, event: BodyEvent) -> OwnerAnswer | None:
        if isinstance(event, ReceiveLease):
            return await self._bringer.receive(event)
        if self._num_bringing > MAX_BRINGING:
            return self._host.ask(LeaseBlocks(event.owner, event.epoch, event.lease, event.keys, event.tenant))
        return await self._bringer.bring(event)

    def _reply(self, peer: str, call_id: int | None, event: OwnerEvent | BodyEvent, answer: OwnerAnswer | None) -> None:
        self._flush_soon()
        if isinstance(answer, Refused):
            self._log.warning("refused", peer=peer, event_type=type(event).__name__, why=answer.message)
        elif call_id is None:
            return
        arena = self._host.arena.handle if isinstance(event, OwnerJoined) else None
        if not self._instances.send(peer, PoolReply(call_id, answer, arena)):
            self._log.warning("answer undeliverable", peer=peer, event_type=type(event).__name__)

    async def _obey(self) -> None:
        """Do what the hub says until it says Shutdown."""
        while True:
            match await self._hub.recv():
                case OwnerLost() | ReleaseLease() as event:
                    if isinstance(event, OwnerLost):
                        self._bringer.let_go(event.owner)
                    self._host.handle(event)
                    self._flush_soon()
                case PeersChanged(peers=peers):
                    self._peers.update(peers)
                case CopyBlocks() as event:
                    if self._num_bringing < MAX_BRINGING:
                        self._tasks.create_task(self._bringer.copy(event))
                case Order() as order:
                    self._hub.send(carry_out(order, self._host, self._node))
                    self._flush_soon()
                case Resync():
                    self._host.start_over()
                    self._flush_soon()
                case Shutdown():
                    await self._write_out()
                    return

    async def _write_out(self) -> None:
        """What is not on the SSD yet would have to be computed again after the restart."""
        give_up = self._host.now + FLUSH_S
        while (stats := self._host.node.stats()).writing or stats.spills_waiting:
            if self._host.now >= give_up:
                self._log.warning("ended before all was on the SSD", blocks=stats.writing + stats.spills_waiting)
                return
            await asyncio.sleep(FLUSH_PAUSE_S)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._host.tick()
            self._flush()

    async def _report(self) -> None:
        since_check = 0.0
        while True:
            stats = replace(self._host.node.stats(), broken_invariants=self.broken_invariants)
            tenants = tuple([TenantUsage(t.tenant, t.published, t.quota) for t in stats.tenants])
            self._hub.send(PoolReport(self._node, stats, self._usage(), tenants))
            await asyncio.sleep(REPORT_S)
            since_check += REPORT_S
            if since_check >= CHECK_S:
                since_check = 0.0
                self._check()

    def _check(self) -> None:
        error = self._host.check_if_dirty()
        if error is not None:
            self.broken_invariants += 1
            self._log.error("broken invariant, a bug of ours", error=str(error))

    def _flush_soon(self) -> None:
        """Tell the hub at the end of this turn of the loop, so that a burst of events makes one message."""
        if not self._flush_due and self._host.has_changes:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """What the hub cannot take now is told with the next tick."""
        self._flush_due = False
        if self._host.needs_hello:
            if not self._hub.send(self._host.hello()):
                return
            self._host.confirm_hello()
        changes = self._host.changes()
        if changes is not None and self._hub.send(changes):
            self._host.confirm_changes()


async def serve(config: PoolConfig) -> None:
    """Make the arena, open the sockets, run; all of it is gone at the end."""
    logs.setup(config.log_level, json=config.log_json)
    arena = create_arena(config.num_slots, config.slot_bytes)
    async with contextlib.AsyncExitStack() as stack:
        prefault = Prefault(arena)
        stack.callback(prefault.stop)
        hub: ZmqChannel[ToPool, FromPool] = ZmqChannel(config.hub, config.name, msgspec.msgpack.Decoder(ToPool))
        stack.callback(hub.close)
        instances: ZmqListener[PoolCall, PoolReply] = ZmqListener(config.listen, msgspec.msgpack.Decoder(PoolCall))
        stack.callback(instances.close)
        peer, mover = await _reach(config, arena, instances, stack)
        ssd = _open_ssd(config)
        brain = _brain(config, ssd.num_slots if ssd is not None else 0)
        host = PoolHost(config.node, brain, arena, asyncio.get_running_loop().time, peer=peer)
        body = PoolBody(
            host,
            config.node,
            epoch=config.epoch,
            instances=instances,
            hub=hub,
            mover=mover,
            usage=_no_transports if mover is None else mover.usage,
            disk=await start_disk(host, ssd, stack) if ssd is not None else None,
            num_layers=config.num_layers,
        )
        await body.run()


async def _reach(
    config: PoolConfig, arena: Arena, instances: ZmqListener[PoolCall, PoolReply], stack: contextlib.AsyncExitStack
) -> tuple[Callable[[], PeerPool | None], MessengerMover | None]:
    """Be reachable for other nodes' pools, and able to read from their arenas; neither without an address."""
    if config.advertise is None:
        return lambda: None, None
    control = instances.listen_too(tcp_address(config.advertise, 0))
    server = await TcpServer.start(arena, config.advertise)
    stack.push_async_callback(server.close)
    nixl = _nixl(arena) if "nixl" in config.transports else None
    made: dict[str, Transport | None] = {"shm": ShmTransport(arena), "tcp": TcpTransport(arena), "nixl": nixl}
    transports = [transport for name in config.transports if (transport := made[name]) is not None]
    messenger = Messenger(config.node, transports, slot_bytes=config.slot_bytes, num_layers=config.num_layers)
    stack.push_async_callback(messenger.close)

    def here() -> PeerPool:
        address = nixl.address if nixl is not None else None
        found = PeerArena(config.node, arena.handle, host_identity(), tcp=server.address, nixl=address)
        return PeerPool(config.node, config.epoch, control, found, config.rack, config.link_bytes_s)

    return here, MessengerMover(messenger)


def _nixl(arena: Arena) -> NixlTransport:
    try:
        from kvasir.store.messenger.nixl import NixlTransport
    except ImportError as error:
        raise ConfigError(
            f"--transports nixl needs NIXL, which is not here: pip install 'kvasir-serve[nixl]' ({error})"
        ) from None
    return NixlTransport(arena)


def _open_ssd(config: PoolConfig) -> SsdFile | None:
    if config.ssd_path is None or not config.ssd_bytes:
        return None
    num_slots = places_that_fit(config.ssd_bytes, config.slot_bytes)
    if not num_slots:
        raise ConfigError(
            f"--ssd {format_size(config.ssd_bytes)} holds no block of {format_size(config.slot_bytes)}; give more"
        )
    return open_ssd(config.ssd_path, num_slots=num_slots, slot_bytes=config.slot_bytes, identity=config.identity)


def _brain(config: PoolConfig, ssd_slots: int) -> PoolNode:
    if not ssd_slots:
        return PoolNode(config.num_slots, _eviction(config))
    return PoolNode(
        config.num_slots,
        _eviction(config),
        ssd_slots=ssd_slots,
        ssd_eviction=_eviction(config),
        max_spilling=max_spilling(config.slot_bytes),
        low_free=config.num_slots // LOW_FREE,
        high_free=config.num_slots // HIGH_FREE,
    )


def _eviction(config: PoolConfig) -> Eviction:
    def no_seconds(depth: int) -> float:
        raise ConfigError(f"eviction {config.eviction} needs costs")

    seconds = no_seconds if config.costs is None else block_seconds(config.costs, config.block_tokens)
    return choose("eviction", config.eviction, EVICTIONS)(seconds)


def main() -> None:
    config, lifeline = child_config(PoolConfig)

    def remove_sockets() -> None:
        if config.runtime_directory is not None:
            remove_runtime_directory(Path(config.runtime_directory))

    try:
        run_child(lambda: serve(config), lifeline, when_orphaned=remove_sockets)
    except KvasirError as error:
        print(f"kvasir: {config.name}: {error}", file=sys.stderr)
        sys.exit(BAD_SETUP_EXIT)


if __name__ == "__main__":
    main()
