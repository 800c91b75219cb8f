"""All processes of one node, started and watched from one place: the pool, the instances, and in this process the hub."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass

import msgspec
import structlog
from msgspec.structs import replace

from kvasir.cluster.config import ServeConfig
from kvasir.cluster.hub import Clock, Hub, Send, pool_name
from kvasir.cluster.instance_process import BAD_SETUP_EXIT, InstanceSetup, stash_pages
from kvasir.cluster.lifeline import Lifeline, start_process
from kvasir.cluster.messages import FromNode, Message, Progress, Shutdown
from kvasir.cluster.pool_process import PoolConfig
from kvasir.cluster.wire import ZmqListener, ipc_address, make_runtime_directory
from kvasir.core.errors import ClusterError, ConfigError
from kvasir.core.events import InstanceInfo
from kvasir.core.pool_events import PoolEvent
from kvasir.core.request import Role
from kvasir.core.units import format_size
from kvasir.costs.fitted import FittedCost
from kvasir.costs.roofline import RooflineCost
from kvasir.engine.interface import ModelSpec
from kvasir.store.arena import PAGE_BYTES, slots_that_fit

NODE = "node0"
STOP_GRACE_S = 5.0
MAX_RESTARTS = 5
STABLE_S = 60.0
"""An instance that ran for so long before it died is not one that cannot run."""
MIN_SLOTS = 16
"""A pool of fewer blocks cannot even keep its instances' hands full."""
RESTART_PAUSE_S = 0.5


@dataclass(slots=True)
class _Child:
    name: str
    process: Process
    started_s: float
    restarts: int = 0


def fit_to_pool(spec: ModelSpec, config: ServeConfig) -> ModelSpec:
    """The spec with a context that one request can have in this pool. Raises ConfigError when the pool is too small.

    Every instance keeps a few pages in its hand, which one long request cannot use.
    """
    num_slots = slots_that_fit(config.dram_bytes, spec.slot_bytes)
    if num_slots < MIN_SLOTS:
        need = format_size(MIN_SLOTS * (spec.slot_bytes + PAGE_BYTES))
        raise ConfigError(f"--dram {config.dram} holds {num_slots} blocks of this model; give at least {need}")
    usable = (num_slots - sum(config.roles) * stash_pages(num_slots, config)) * spec.block_tokens
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
        self._lifeline = Lifeline()
        self._hub_address = ipc_address(self._directory, "hub")
        self._pool_address = ipc_address(self._directory, "pool")
        self._listener: ZmqListener[FromNode, Message | PoolEvent] = ZmqListener(
            self._hub_address, msgspec.msgpack.Decoder(FromNode)
        )
        self._clock = asyncio.get_running_loop().time
        self.hub = make_hub(self._listener.send, self._clock)
        self.hub.on_silent = self._end_silent
        self._failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._children: dict[str, _Child] = {}
        self._stopping = asyncio.Event()
        self._log = structlog.get_logger().bind(part="launcher")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[LocalCluster]:
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(self._take_messages()), tasks.create_task(self.hub.run_ticks())]
            try:
                await self._start_pool(tasks)
                for info in self._instances():
                    await self._start_instance(tasks, info)
                yield self
            finally:
                await self._stop()
                for task in background:
                    task.cancel()

    @property
    def processes(self) -> dict[str, int]:
        """Process ids by name: every instance, and the pool."""
        return {name: child.process.pid for name, child in self._children.items()}

    async def ready(self, deadline_s: float) -> None:
        """Wait until every instance has joined. Raises ClusterError."""
        try:
            async with asyncio.timeout(deadline_s):
                while not (self.hub.status().ready and len(self.hub.status().instances) == len(self._children) - 1):
                    if self._failed.done():
                        raise ClusterError(self._failed.result())
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise ClusterError(f"the cluster was not ready within {deadline_s:g} s: {self.hub.status().reason}") from None

    async def wait_failed(self) -> None:
        """Wait for as long as the cluster can go on; then raise ClusterError."""
        raise ClusterError(await asyncio.shield(self._failed))

    async def _stop(self) -> None:
        """Ask every process to end, wait, then insist."""
        self._stopping.set()
        joined = {status.info.id for status in self.hub.status().instances} | {pool_name(NODE)}
        for child in self._children.values():
            self._listener.send(child.name, Shutdown())
            if child.name not in joined and child.process.returncode is None:
                child.process.kill()  # it is still loading: it hears nothing, and holds nothing
        await self._wait_for_children()
        self._lifeline.close()
        for child in self._children.values():
            if child.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()
        await self._wait_for_children()
        self._listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _wait_for_children(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_GRACE_S):
                for child in self._children.values():
                    await child.process.wait()

    # --- starting ----------------------------------------------------------------------------------------------

    async def _start_pool(self, tasks: asyncio.TaskGroup) -> None:
        setup = PoolConfig(
            name=pool_name(NODE),
            node=NODE,
            listen=self._pool_address,
            hub=self._hub_address,
            num_slots=self.num_slots,
            slot_bytes=self._spec.slot_bytes,
            runtime_directory=str(self._directory),
            log_level=self._config.log_level,
            log_json=self._config.log_json,
        )
        await self._start(tasks, pool_name(NODE), "kvasir.cluster.pool_process", setup, self._pool_ended)

    async def _start_instance(self, tasks: asyncio.TaskGroup, info: InstanceInfo, restarts: int = 0) -> None:
        setup = InstanceSetup(
            info=info,
            spec=self._spec,
            costs=self._costs,
            num_slots=self.num_slots,
            hub_address=self._hub_address,
            pool_address=self._pool_address,
            config=self._config,
        )

        async def ended(status: int) -> None:
            await self._instance_ended(tasks, info, status)

        await self._start(tasks, info.id, "kvasir.cluster.instance_process", setup, ended, restarts)

    async def _start(
        self,
        tasks: asyncio.TaskGroup,
        name: str,
        module: str,
        setup: msgspec.Struct,
        ended: Callable[[int], Coroutine[None, None, None]],
        restarts: int = 0,
    ) -> None:
        process = await start_process(module, setup, env=self._environment(), lifeline=self._lifeline)
        self._children[name] = _Child(name, process, self._clock(), restarts)
        tasks.create_task(self._watch(process, ended))

    def _environment(self) -> dict[str, str]:
        """Threads that wait must sleep: instances share the cores, and a spinning one would take them from the others."""
        threads = str(self._config.threads or os.cpu_count() or 1)
        return {
            "OMP_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def _instances(self) -> list[InstanceInfo]:
        prefill, decode, mixed = self._config.roles
        roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode + [Role.MIXED] * mixed
        numbers: Counter[Role] = Counter()
        infos = []
        for role in roles:
            infos.append(
                InstanceInfo(
                    id=f"{role.value}-{numbers[role]}",
                    role=role,
                    node=NODE,
                    epoch=1,
                    kv_tokens=self.num_slots * self._spec.block_tokens,
                    max_batch=self._config.max_batch,
                )
            )
            numbers[role] += 1
        return infos

    # --- watching ----------------------------------------------------------------------------------------------

    async def _take_messages(self) -> None:
        while True:
            peer, message = await self._listener.recv()
            if isinstance(message, Progress):
                self._on_progress(message)
            else:
                self.hub.take(peer, message)

    async def _watch(self, process: Process, ended: Callable[[int], Coroutine[None, None, None]]) -> None:
        status = await process.wait()
        if not self._stopping.is_set():
            await ended(status)

    async def _instance_ended(self, tasks: asyncio.TaskGroup, info: InstanceInfo, status: int) -> None:
        """A dead instance's requests go elsewhere; the instance itself is started again, a few times."""
        child = self._children[info.id]
        restarts = child.restarts if self._clock() - child.started_s < STABLE_S else 0
        self.hub.lose_instance(info.id)
        if status == BAD_SETUP_EXIT or restarts >= MAX_RESTARTS:
            self._fail(f"{info.id} cannot run (exit status {status}); its message is above")
            return
        self._log.warning("instance ended; starting it again", instance=info.id, status=status, restart=restarts + 1)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), RESTART_PAUSE_S * 2**restarts)
        if self._stopping.is_set():
            return
        await self._start_instance(tasks, replace(info, epoch=info.epoch + 1), restarts + 1)

    def _end_silent(self, name: str) -> None:
        """A process that hangs may wake up and write into slots that are others' by then; `_watch` sees its end."""
        if (child := self._children.get(name)) is not None and child.process.returncode is None:
            child.process.kill()

    async def _pool_ended(self, status: int) -> None:
        """The node's KV is gone with its pool, and its instances' memory: this node cannot go on."""
        self.hub.lose_node(NODE)
        self._fail(f"the pool process ended (exit status {status})")

    def _fail(self, reason: str) -> None:
        if not self._failed.done():
            self._failed.set_result(reason)
