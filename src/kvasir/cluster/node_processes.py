"""The processes of one node: its pool and its instances, started, watched, started again, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import structlog
from msgspec.structs import replace

from kvasir.cluster.config import ServeConfig
from kvasir.cluster.instance_process import BAD_SETUP_EXIT, InstanceSetup
from kvasir.cluster.lifeline import Lifeline, start_process
from kvasir.cluster.names import instance_name, pool_name
from kvasir.cluster.pool_process import PoolConfig
from kvasir.cluster.wire import ipc_address
from kvasir.core.events import InstanceInfo
from kvasir.core.request import Role
from kvasir.costs.fitted import FittedCost
from kvasir.costs.roofline import RooflineCost
from kvasir.engine.interface import ModelSpec
from kvasir.scheduling.strategy import strategy
from kvasir.store.arena import slots_that_fit

STOP_GRACE_S = 5.0
MAX_RESTARTS = 5
STABLE_S = 60.0
"""An instance that ran for so long before it died is not one that cannot run."""
RESTART_PAUSE_S = 0.5


class Owner(Protocol):
    """Whoever the processes run for."""

    def ask_to_stop(self, name: str) -> bool:
        """Ask a process to end in order; False if it has not come so far as to hear."""
        ...

    def instance_ended(self, name: str) -> None: ...

    def cannot_go_on(self, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class NodeSetup:
    """What a node's processes are told. Other nodes reach its pool at `advertise`; None: they do not."""

    node: str
    epoch: int
    config: ServeConfig
    spec: ModelSpec
    costs: FittedCost | RooflineCost
    hub_address: str
    directory: Path
    advertise: str | None

    @property
    def num_slots(self) -> int:
        return slots_that_fit(self.config.dram_bytes, self.spec.slot_bytes)


@dataclass(slots=True)
class _Child:
    name: str
    process: Process
    started_s: float
    restarts: int = 0


class NodeProcesses:
    """`start` once, `stop` once; in between, an instance that ends is started again, a few times."""

    def __init__(self, setup: NodeSetup, owner: Owner, tasks: asyncio.TaskGroup):
        self._setup = setup
        self._owner = owner
        self._tasks = tasks
        self._lifeline = Lifeline()
        self._pool_address = ipc_address(setup.directory, "pool")
        self._clock = asyncio.get_running_loop().time
        self._infos = self._instances()
        self._numbers = {info.id: number for number, info in enumerate(self._infos)}
        self._children: dict[str, _Child] = {}
        self._stopping = asyncio.Event()
        self._log = structlog.get_logger().bind(part="launcher")

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name: every instance, and the pool."""
        return {name: child.process.pid for name, child in self._children.items()}

    @property
    def num_instances(self) -> int:
        return sum(self._setup.config.split)

    async def start(self) -> None:
        await self._start_pool()
        for info in self._infos:
            await self._start_instance(info)

    async def stop(self) -> None:
        """Ask every process to end, wait, then insist."""
        self._stopping.set()
        for child in self._children.values():
            if not self._owner.ask_to_stop(child.name):
                _kill(child.process)  # it is still loading: it hears nothing, and holds nothing
        await self._wait()
        self._lifeline.close()
        for child in self._children.values():
            _kill(child.process)
        await self._wait()

    def end(self, name: str) -> None:
        """A process that hangs may wake up and write into slots that are others' by then; whoever watches sees its end."""
        if (child := self._children.get(name)) is not None:
            _kill(child.process)

    def terminate(self, name: str) -> None:
        """Ask by a signal."""
        child = self._children[name]
        if child.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_GRACE_S):
                for child in self._children.values():
                    await child.process.wait()

    # --- starting ----------------------------------------------------------------------------------------------

    async def _start_pool(self) -> None:
        setup, config = self._setup, self._setup.config
        pool = PoolConfig(
            name=pool_name(setup.node),
            node=setup.node,
            epoch=setup.epoch,
            listen=self._pool_address,
            hub=setup.hub_address,
            num_slots=setup.num_slots,
            slot_bytes=setup.spec.slot_bytes,
            block_tokens=setup.spec.block_tokens,
            num_layers=setup.spec.shape.num_layers,
            costs=setup.costs,
            eviction=config.eviction or strategy(config.policy).eviction,
            runtime_directory=str(setup.directory),
            advertise=setup.advertise,
            rack=config.rack,
            link_bytes_s=config.link_bytes_s,
            transports=config.transport_names,
            identity=setup.spec.kv_identity,
            ssd_path=config.ssd_path,
            ssd_bytes=config.ssd_bytes,
            log_level=config.log_level,
            log_json=config.log_json,
        )
        await self._start(pool.name, "kvasir.cluster.pool_process", pool, self._pool_ended)

    async def _start_instance(self, info: InstanceInfo, restarts: int = 0) -> None:
        setup = self._setup
        instance = InstanceSetup(
            info=info,
            number=self._numbers[info.id],
            spec=setup.spec,
            costs=setup.costs,
            num_slots=setup.num_slots,
            hub_address=setup.hub_address,
            pool_address=self._pool_address,
            config=setup.config,
        )

        async def ended(status: int) -> None:
            await self._instance_ended(info, status)

        await self._start(info.id, "kvasir.cluster.instance_process", instance, ended, restarts)

    async def _start(
        self,
        name: str,
        module: str,
        setup: msgspec.Struct,
        ended: Callable[[int], Coroutine[None, None, None]],
        restarts: int = 0,
    ) -> None:
        process = await start_process(module, setup, env=self._environment(), lifeline=self._lifeline)
        self._children[name] = _Child(name, process, self._clock(), restarts)
        self._tasks.create_task(self._watch(process, ended))

    def _environment(self) -> dict[str, str]:
        """Threads that wait must sleep: instances share the cores, and a spinning one would take them from the others."""
        threads = str(self._setup.config.threads or os.cpu_count() or 1)
        return {
            "OMP_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def _instances(self) -> list[InstanceInfo]:
        setup, config = self._setup, self._setup.config
        prefill, decode, mixed = config.split
        roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode + [Role.MIXED] * mixed
        numbers: Counter[Role] = Counter()
        infos = []
        for role in roles:
            infos.append(
                InstanceInfo(
                    id=instance_name(role.value, numbers[role], setup.node),
                    role=role,
                    node=setup.node,
                    epoch=1,
                    kv_tokens=setup.num_slots * setup.spec.block_tokens,
                    max_batch=config.max_batch,
                )
            )
            numbers[role] += 1
        return infos

    # --- watching ----------------------------------------------------------------------------------------------

    async def _watch(self, process: Process, ended: Callable[[int], Coroutine[None, None, None]]) -> None:
        status = await process.wait()
        if not self._stopping.is_set():
            await ended(status)

    async def _instance_ended(self, info: InstanceInfo, status: int) -> None:
        """A dead instance's requests go elsewhere; the instance itself is started again, a few times."""
        child = self._children[info.id]
        restarts = child.restarts if self._clock() - child.started_s < STABLE_S else 0
        self._owner.instance_ended(info.id)
        if status == BAD_SETUP_EXIT or restarts >= MAX_RESTARTS:
            self._owner.cannot_go_on(f"{info.id} cannot run (exit status {status}); its message is above")
            return
        self._log.warning("instance ended; starting it again", instance=info.id, status=status, restart=restarts + 1)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), RESTART_PAUSE_S * 2**restarts)
        if self._stopping.is_set():
            return
        await self._start_instance(replace(info, epoch=info.epoch + 1), restarts + 1)

    async def _pool_ended(self, status: int) -> None:
        """The node's KV is gone with its pool, and its instances' memory: this node cannot go on."""
        self._owner.cannot_go_on(f"the pool process ended (exit status {status})")


def _kill(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
