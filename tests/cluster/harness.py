"""A whole cluster in one process and in virtual time: the real bodies and brains over in-memory channels and a fake engine.

The fake engine's tokens depend on every word of KV that it reads, so a wrong, stale or foreign block gives a wrong token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random

import msgspec

from kvasir.cluster.bringer import Mover
from kvasir.cluster.hub import Hub
from kvasir.cluster.instance import InstanceBody
from kvasir.cluster.messages import FromInstance, FromNode, Message, PeerPool, ToInstance
from kvasir.cluster.names import pool_name
from kvasir.cluster.pool_client import attach_slots, connect_pool
from kvasir.cluster.pool_host import PoolHost
from kvasir.cluster.pool_messages import FromPool, PoolCall, PoolReply, ToPool
from kvasir.cluster.pool_process import PoolBody
from kvasir.cluster.service import Submission
from kvasir.cluster.wire_memory import MemoryChannel, MemoryListener
from kvasir.core.errors import ClusterError
from kvasir.core.events import Event, InstanceInfo
from kvasir.core.pool_events import PoolEvent
from kvasir.core.request import Role, Sampling, Slo
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.costs.shape import ModelShape
from kvasir.engine.fake import FakeEngine
from kvasir.engine.interface import ModelSpec, SequenceSlice
from kvasir.pool.node import PoolNode
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.chunking import BatcherConfig
from kvasir.scheduling.conductor import Conductor
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.strategy import strategy
from kvasir.store.arena import ArenaHandle, create_arena
from kvasir.store.messenger.transport import PeerArena, Priority

NODE = "node0"
BLOCK = 16
COSTS = FittedCost(PrefillFit(1e-3, 1e-4, 1e-9, 1e-9), DecodeFit(2e-3, 1e-4, 1e-8), 1e-4, 1e9)
SHAPE = ModelShape(
    num_layers=4,
    hidden=16,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    intermediate=16,
    vocab=997,
    num_params=1000,
    dtype_bytes=4,
)
SPEC = ModelSpec(
    name="fake",
    path="",
    identity="fake",
    architecture="FakeForCausalLM",
    shape=SHAPE,
    dtype="float32",
    layout="fake",
    block_tokens=BLOCK,
    max_model_len=4096,
    eos_token_ids=(0,),
)
LAYER_BYTES = SPEC.slot_bytes // SHAPE.num_layers


@dataclass
class Cluster:
    """What a test holds: the hub to submit to, the brains to look into, and the means to break things."""

    hub: Hub
    conductor: Conductor
    hosts: dict[str, PoolHost]
    mover: MemoryMover
    batchers: dict[str, Batcher] = field(default_factory=dict)
    tell: Callable[[str, Message], bool] = lambda peer, message: False
    kill: Callable[[str], None] = lambda name: None
    kill_node: Callable[..., None] = lambda node, noticed_after_s=0.0: None
    start: Callable[[str, Role, int], None] = lambda name, role, epoch: None

    @property
    def host(self) -> PoolHost:
        """Of the first node."""
        return self.hosts[NODE]

    def check(self) -> None:
        """Every invariant, and that an idle cluster owns exactly the blocks that its index names and its instances' stashes."""
        self.conductor.check()
        for batcher in self.batchers.values():
            batcher.check()
        for node, host in self.hosts.items():
            host.node.check()
            stats = host.node.stats()
            batchers = [batcher for name, batcher in self.batchers.items() if node_of(name) == node]
            stashed = sum(batcher.load().free_kv_tokens // BLOCK for batcher in batchers)
            assert (stats.leases, stats.leased, stats.private) == (0, 0, 0), stats
            assert stats.reserved == stashed, (stats, stashed)
            assert stats.free + stats.reserved + stats.published == stats.slots, stats


class MemoryMover:
    """Moves bytes between the arenas of one process, taking virtual time; `fault`, told the
    priority, may stall or break each read."""

    def __init__(self, hosts: dict[str, PoolHost]):
        self._hosts = hosts
        self.reads: list[tuple[str, str, int]] = []
        self.block_s = 1e-4
        self.fault: Callable[[Priority], Awaitable[None]] = _no_fault

    def to(self, node: str) -> Mover:
        return _Reader(self, node)

    async def read(
        self,
        source: PeerArena,
        target: str,
        pairs: Sequence[tuple[int, int]],
        within_s: float,
        priority: Priority,
        on_layer: Callable[[int], None] | None,
    ) -> None:
        """A layer at a time. What the fake engine reads is in the first; the others take time."""
        self.reads.append((source.node, target, len(pairs)))
        try:
            async with asyncio.timeout(within_s):
                for layer in range(SHAPE.num_layers):
                    for there, here in pairs:
                        await asyncio.sleep(self.block_s / SHAPE.num_layers)
                        await self.fault(priority)
                        part = slice(layer * LAYER_BYTES, (layer + 1) * LAYER_BYTES)
                        self._hosts[target].arena.slot(here)[part] = self._hosts[source.node].arena.slot(there)[part]
                    if on_layer is not None:
                        on_layer(layer + 1)
        except TimeoutError:
            raise ClusterError(f"blocks from {source.node} did not come within {within_s:g} s") from None


@dataclass(frozen=True)
class _Reader:
    mover: MemoryMover
    node: str

    async def read(
        self,
        peer: PeerArena,
        pairs: Sequence[tuple[int, int]],
        *,
        within_s: float,
        priority: Priority,
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        await self.mover.read(peer, self.node, pairs, within_s, priority, on_layer)


async def _no_fault(priority: Priority) -> None:
    return None


def node_of(instance: str) -> str:
    """`decode-0@node1` is on node1, a name without a node on the first."""
    return instance.partition("@")[2] or NODE


@dataclass(frozen=True)
class Brains:
    """Who decides in a cluster, and the costs that they predict with and that its engines take."""

    conductor: Conductor
    make_batcher: Callable[[InstanceInfo], Batcher]
    pool: PoolNode
    costs: FittedCost = COSTS


def default_brains(
    num_slots: int, policy: str, chunk_tokens: int, max_batch: int, *, max_stages: int = 1, slo: Slo | None = None
) -> Brains:
    """Those of `kvasir serve`, which admit everything."""
    conductor = (
        strategy(policy)
        .with_parts(admission="off")
        .live(chunk_tokens)
        .conductor(
            ConductorConfig(
                kv_bytes_per_token=SHAPE.kv_bytes_per_token,
                block_tokens=BLOCK,
                shares_cores=True,
                max_stages=max_stages,
                stages_on_one_node=True,
            ),
            COSTS,
            slo or Slo(),
            Random(0),
        )
    )
    config = BatcherConfig(block_tokens=BLOCK, max_batch=max_batch, max_step_tokens=chunk_tokens, stash_pages=4, starve_s=60.0)
    return Brains(conductor, lambda info: Batcher(config, COSTS), PoolNode(num_slots))


@asynccontextmanager
async def cluster(
    roles: dict[str, Role],
    *,
    num_slots: int = 512,
    policy: str = "mooncake",
    chunk_tokens: int = 64,
    max_batch: int = 16,
    brains: Brains | None = None,
    hear: Callable[[str, Event, float], None] = lambda brain, event, now: None,
) -> AsyncIterator[Cluster]:
    """`hear` is told of each event that the `conductor` or the batcher of an instance takes."""
    clock = asyncio.get_running_loop().time
    to_hub: MemoryListener[FromNode, Message | PoolEvent] = MemoryListener(msgspec.msgpack.Decoder(FromNode))
    brains = brains or default_brains(num_slots, policy, chunk_tokens, max_batch)
    conductor = brains.conductor
    hub = Hub(SPEC, conductor, send=to_hub.send, clock=clock, request_timeout_s=600.0)
    hub.on_event = partial(hear, "conductor")
    nodes = sorted({NODE, *map(node_of, roles)})
    hosts: dict[str, PoolHost] = {}
    mover = MemoryMover(hosts)
    ports: dict[str, MemoryListener[PoolCall, PoolReply]] = {}
    found = Cluster(hub, conductor, hosts, mover)
    found.tell = to_hub.send
    bodies: dict[str, asyncio.Task[None]] = {}
    pools: dict[str, asyncio.Task[None]] = {}
    peers: dict[str, PeerPool] = {}

    def open_channel(control: str, me: str) -> MemoryChannel[PoolReply, PoolCall]:
        return MemoryChannel(ports[control], me, msgspec.msgpack.Decoder(PoolReply))

    def make_pool(node: str) -> PoolBody:
        brain = brains.pool if node == NODE else PoolNode(num_slots)
        if len(nodes) > 1:
            peers[node] = PeerPool(node, 1, node, peer_arena(node))
        hosts[node] = PoolHost(node, brain, create_arena(num_slots, SPEC.slot_bytes), clock, peer=partial(peers.get, node))
        ports[node] = MemoryListener(msgspec.msgpack.Decoder(PoolCall))
        channel: MemoryChannel[ToPool, FromPool] = MemoryChannel(to_hub, pool_name(node), msgspec.msgpack.Decoder(ToPool))
        return PoolBody(
            hosts[node],
            node,
            instances=ports[node],
            hub=channel,
            mover=mover.to(node),
            num_layers=SHAPE.num_layers,
            open_channel=open_channel,
        )

    async def take() -> None:
        while True:
            peer, message = await to_hub.recv()
            hub.take(peer, message)

    async def instance(name: str, role: Role, epoch: int) -> None:
        info = InstanceInfo(name, role, node_of(name), epoch, num_slots * BLOCK, max_batch)
        channel: MemoryChannel[ToInstance, FromInstance] = MemoryChannel(to_hub, name, msgspec.msgpack.Decoder(ToInstance))
        batcher = brains.make_batcher(info)
        found.batchers[name] = batcher
        engine = FakeEngine(SPEC, brains.costs)
        async with connect_pool(open_channel(node_of(name), name), name, epoch) as client:
            engine.attach(await client.join())
            body = InstanceBody(
                info,
                engine,
                batcher,
                client,
                max_gap_s=0.05,
                chunk_tokens=chunk_tokens,
                receive=channel.recv,
                send=channel.send,
            )
            body.on_event = partial(hear, name)
            await body.run()

    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        background = [tasks.create_task(take()), tasks.create_task(hub.run_ticks())]
        for node in nodes:
            pools[node] = tasks.create_task(make_pool(node).run())

        def start(name: str, role: Role, epoch: int) -> None:
            bodies[name] = tasks.create_task(instance(name, role, epoch))

        def kill(name: str) -> None:
            bodies.pop(name).cancel()
            del found.batchers[name]
            hub.lose_instance(name)

        def kill_node(node: str, noticed_after_s: float = 0.0) -> None:
            """All its processes end at once; the hub hears of it later."""
            pools.pop(node).cancel()
            for name in [name for name in bodies if node_of(name) == node]:
                bodies.pop(name).cancel()
                del found.batchers[name]
            del hosts[node]
            asyncio.get_running_loop().call_later(noticed_after_s, hub.lose_node, node)

        found.start, found.kill, found.kill_node = start, kill, kill_node
        for name, role in roles.items():
            start(name, role, 1)
        while len(hub.status().instances) < len(roles):
            await asyncio.sleep(0.01)
        try:
            yield found
        finally:
            for task in [*bodies.values(), *pools.values(), *background]:
                task.cancel()


def submission(request_id: str, prompt: list[int], max_tokens: int, *, salt: str = "") -> Submission:
    return Submission(request_id, prompt, max_tokens, Sampling(temperature=0.0), salt=salt)


async def answer(hub: Hub, asked: Submission) -> tuple[list[int], int]:
    """All tokens of an answer, and how many of the prompt's came from cache."""
    tokens: list[int] = []
    cached = 0
    async for output in hub.submit(asked):
        tokens += [token.token for token in output.tokens]
        cached = cached if output.cached_tokens is None else output.cached_tokens
    return tokens, cached


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    """What the fake model answers, computed by an engine of its own in one go: no cache, no chunks, no hand-off."""
    engine = FakeEngine(SPEC, COSTS, sleep=_no_sleep)
    total = len(prompt) + max_tokens
    count = total // BLOCK + 1
    arena = create_arena(count, SPEC.slot_bytes)
    engine.attach(attach_slots(arena))
    tokens = list(prompt)
    start = 0
    while len(tokens) < total:
        part = SequenceSlice("only", tokens[start:], start, range(count), Sampling(temperature=0.0))
        start = len(tokens)
        coroutine = engine.step([part])
        try:
            coroutine.send(None)
        except StopIteration as stopped:
            tokens.append(stopped.value.tokens["only"].token)
    return tokens[len(prompt) :]


async def _no_sleep(seconds: float) -> None:
    return None


def peer_arena(node: str) -> PeerArena:
    return PeerArena(node, ArenaHandle(0, 0, b"", 0, 0, 0), "here")
