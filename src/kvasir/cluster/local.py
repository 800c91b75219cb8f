"""The head of a cluster: in this process the hub, beside it its own node's processes, and the door for nodes that join."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable

import msgspec
from msgspec.structs import replace

from kvasir.cluster.config import ServeConfig
from kvasir.cluster.hub import Clock, Hub, Send
from kvasir.cluster.instance_process import stash_pages
from kvasir.cluster.membership import Members
from kvasir.cluster.messages import FromNode, HelloNode, InstanceGone, LeaveNode, Message, NodeAlive, Progress, Shutdown
from kvasir.cluster.names import HEAD, pool_name
from kvasir.cluster.node_processes import NodeProcesses, NodeSetup
from kvasir.cluster.wire import ZmqListener, ipc_address, make_runtime_directory, split_address, tcp_address
from kvasir.core.errors import ClusterError, ConfigError
from kvasir.core.pool_events import PoolEvent
from kvasir.core.units import format_size
from kvasir.costs.fitted import FittedCost
from kvasir.costs.roofline import RooflineCost
from kvasir.engine.interface import ModelSpec
from kvasir.store.arena import PAGE_BYTES, slots_that_fit

MIN_SLOTS = 16
"""A pool of fewer blocks cannot even keep its instances' hands full."""


def fit_to_pool(spec: ModelSpec, config: ServeConfig) -> ModelSpec:
    """The spec with a context that one request can have in this pool. Raises ConfigError when the pool is too small.

    Every instance keeps a few pages in its hand, which one long request cannot use.
    """
    num_slots = slots_that_fit(config.dram_bytes, spec.slot_bytes)
    if num_slots < MIN_SLOTS:
        need = format_size(MIN_SLOTS * (spec.slot_bytes + PAGE_BYTES))
        raise ConfigError(f"--dram {config.dram} holds {num_slots} blocks of this model; give at least {need}")
    usable = (num_slots - sum(config.split) * stash_pages(num_slots, config)) * spec.block_tokens
    if usable >= spec.max_model_len:
        return spec
    if config.max_model_len is not None:
        asked = f"--max-model-len asks for {config.max_model_len}"
        raise ConfigError(f"--dram {config.dram} holds a request of {usable} tokens, {asked}; give more")
    return replace(spec, max_model_len=usable)


class LocalCluster:
    """Everything runs between entering and leaving `running`; nothing of it is left afterwards."""

    def __init__(
        self,
        config: ServeConfig,
        spec: ModelSpec,
        costs: FittedCost | RooflineCost,
        make_hub: Callable[[Send, Clock], Hub],
        *,
        on_progress: Callable[[Progress], None],
    ):
        self._config = config
        self._spec = spec
        self._costs = costs
        self.num_slots = slots_that_fit(config.dram_bytes, spec.slot_bytes)
        self._on_progress = on_progress
        self._directory = make_runtime_directory()
        self._listener: ZmqListener[FromNode, Message | PoolEvent] = ZmqListener(
            ipc_address(self._directory, "hub"), msgspec.msgpack.Decoder(FromNode)
        )
        self.cluster_address = self._listen_to_nodes()
        clock = asyncio.get_running_loop().time
        self.hub = make_hub(self._listener.send, clock)
        self.hub.on_silent = self._end_silent
        self.members = Members(self.hub, self._listener.send, clock)
        self._failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._processes: NodeProcesses | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[LocalCluster]:
        async with asyncio.TaskGroup() as tasks:
            work = (self._take_messages, self.hub.run_ticks, self.members.run)
            background = [tasks.create_task(one()) for one in work]
            self._processes = NodeProcesses(self._setup(), self, tasks)
            try:
                await self._processes.start()
                yield self
            finally:
                self.members.dismiss()
                await self._processes.stop()
                self._listener.close()
                shutil.rmtree(self._directory, ignore_errors=True)
                for task in background:
                    task.cancel()

    @property
    def processes(self) -> dict[str, int]:
        """Process ids by name: every instance of this node, and its pool."""
        return self._processes.pids if self._processes is not None else {}

    async def ready(self, deadline_s: float) -> None:
        """Wait until every instance of this node has joined; what is missing then, other nodes bring. Raises ClusterError."""
        wanted = sum(self._config.split)
        try:
            async with asyncio.timeout(deadline_s):
                while self._num_joined < wanted:
                    if self._failed.done():
                        raise ClusterError(self._failed.result())
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise ClusterError(f"the cluster was not ready within {deadline_s:g} s: {self.hub.status().reason}") from None

    def tell(self, peer: str, message: Message) -> bool:
        """Deliver a message to a process of the cluster, and say whether it could be."""
        return self._listener.send(peer, message)

    async def wait_failed(self) -> None:
        """Wait for as long as the cluster can go on; then raise ClusterError."""
        raise ClusterError(await asyncio.shield(self._failed))

    # --- what this node's processes do (Owner) -----------------------------------------------------------------

    def ask_to_stop(self, name: str) -> bool:
        joined = {status.info.id for status in self.hub.status().instances} | {pool_name(HEAD)}
        return self._listener.send(name, Shutdown()) and name in joined

    def instance_ended(self, name: str) -> None:
        self.hub.lose_instance(name)

    def cannot_go_on(self, reason: str) -> None:
        if not self._failed.done():
            self._failed.set_result(reason)

    # --- the rest ----------------------------------------------------------------------------------------------

    def _setup(self) -> NodeSetup:
        return NodeSetup(
            node=HEAD,
            epoch=1,
            config=self._config,
            spec=self._spec,
            costs=self._costs,
            hub_address=self._listener.address,
            directory=self._directory,
            advertise=self._config.advertised if self.cluster_address is not None else None,
        )

    def _listen_to_nodes(self) -> str | None:
        if self._config.listen_nodes is None:
            return None
        return self._listener.listen_too(tcp_address(*split_address("listen-nodes", self._config.listen_nodes)))

    @property
    def _num_joined(self) -> int:
        return sum(status.info.node == HEAD for status in self.hub.status().instances)

    async def _take_messages(self) -> None:
        while True:
            peer, message = await self._listener.recv()
            match message:
                case Progress():
                    self._on_progress(message)
                case HelloNode() | NodeAlive() | InstanceGone() | LeaveNode():
                    self.members.take(peer, message)
                case _:
                    self.hub.take(peer, message)

    def _end_silent(self, name: str) -> None:
        if name in self.processes and self._processes is not None:
            self._processes.end(name)
        else:
            self.members.end_instance(name)
