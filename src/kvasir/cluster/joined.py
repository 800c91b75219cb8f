"""A node that joins a running cluster: its processes work for the head's hub, which this process keeps the lease with."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from kvasir.cluster.config import ServeConfig
from kvasir.cluster.local import fit_to_pool
from kvasir.cluster.membership import with_length
from kvasir.cluster.messages import (
    EndInstance,
    FromJoiner,
    Goodbye,
    HelloNode,
    HubAlive,
    InstanceGone,
    LeaveNode,
    NodeAlive,
    NotWelcome,
    ToJoiner,
    Welcome,
)
from kvasir.cluster.node_processes import NodeProcesses, NodeSetup
from kvasir.cluster.wire import ZmqChannel, make_runtime_directory, split_address, tcp_address
from kvasir.core.errors import ClusterError
from kvasir.costs.fitted import FittedCost
from kvasir.costs.roofline import RooflineCost
from kvasir.engine.interface import ModelSpec

WELCOME_S = 10.0
HELLO_EVERY_S = 1.0
SILENT_S = 10.0
"""A head that has not answered for so long is gone."""
LEAVE_S = 70.0
"""A head that does not say goodbye for so long is not waited for."""


class JoinedNode:
    """Runs from `run` to its end: the head says goodbye, `leave` is set and the node has drained, or something is broken."""

    def __init__(
        self,
        config: ServeConfig,
        spec: ModelSpec,
        costs: FittedCost | RooflineCost,
        *,
        leave: asyncio.Event,
        on_joined: Callable[[str], None],
    ):
        assert config.join is not None, "a node that joins was told whom"
        self._config = config
        self._spec = fit_to_pool(spec, config)
        self._costs = costs
        self._leave = leave
        self._on_joined = on_joined
        self._head = tcp_address(*split_address("join", config.join))
        self._channel: ZmqChannel[ToJoiner, FromJoiner] = ZmqChannel(
            self._head, f"agent#{secrets.token_hex(8)}", msgspec.msgpack.Decoder(ToJoiner)
        )
        self._clock = asyncio.get_running_loop().time
        self._broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._heard_s = self._clock()
        self._log = structlog.get_logger().bind(part="node")

    async def run(self) -> None:
        """Raises ClusterError when the head refuses, falls silent, or a process of this node cannot run."""
        directory = make_runtime_directory()
        try:
            await self._run(await self._join(), directory)
        finally:
            self._channel.close()
            shutil.rmtree(directory, ignore_errors=True)

    async def _join(self) -> Welcome:
        """Ask until somebody answers."""
        hello = HelloNode(self._spec, sum(self._config.split))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WELCOME_S):
                while True:
                    self._channel.send(hello)
                    with contextlib.suppress(TimeoutError):
                        return _welcome(await asyncio.wait_for(self._channel.recv(), HELLO_EVERY_S))
        raise ClusterError(f"nobody answers at {self._config.join} within {WELCOME_S:g} s; is `--listen-nodes` given there?")

    async def _run(self, welcome: Welcome, directory: Path) -> None:
        self._node, self._epoch = welcome.node, welcome.epoch
        setup = NodeSetup(
            node=welcome.node,
            epoch=welcome.epoch,
            config=self._config,
            spec=with_length(self._spec, welcome),
            costs=self._costs,
            hub_address=self._head,
            directory=directory,
            advertise=self._config.advertised,
        )
        self._on_joined(welcome.node)
        async with asyncio.TaskGroup() as tasks:
            self._processes = NodeProcesses(setup, self, tasks)
            background = [tasks.create_task(self._renew(welcome.lease_s / 3)), tasks.create_task(self._say_leave())]
            try:
                await self._processes.start()
                await self._obey()
            finally:
                await self._processes.stop()
                for task in background:
                    task.cancel()

    async def _obey(self) -> None:
        """Do what the head says until it says Goodbye, or something breaks."""
        while True:
            message = await self._next()
            self._heard_s = self._clock()
            match message:
                case Goodbye():
                    self._log.info("the head said goodbye", node=self._node)
                    return
                case EndInstance(instance=instance):
                    self._processes.end(instance)
                case HubAlive(known=False):
                    raise ClusterError(f"the head has given {self._node} up: it was silent for too long; start it again")
                case _:
                    pass

    async def _next(self) -> ToJoiner:
        """What the head says next. Raises ClusterError as soon as something is broken."""
        heard = asyncio.ensure_future(self._channel.recv())
        wait: set[asyncio.Future[ToJoiner] | asyncio.Future[str]] = {heard, self._broken}
        await asyncio.wait(wait, return_when=asyncio.FIRST_COMPLETED)
        if self._broken.done():
            heard.cancel()
            raise ClusterError(self._broken.result())
        return heard.result()

    async def _renew(self, every_s: float) -> None:
        while True:
            self._channel.send(NodeAlive(self._node, self._epoch))
            if self._clock() - self._heard_s > SILENT_S:
                self.cannot_go_on(f"the head at {self._config.join} has been silent for {SILENT_S:g} s")
            await asyncio.sleep(every_s)

    async def _say_leave(self) -> None:
        await self._leave.wait()
        self._channel.send(LeaveNode(self._node))
        await asyncio.sleep(LEAVE_S)
        self.cannot_go_on(f"the head did not let {self._node} go within {LEAVE_S:g} s")

    # --- what this node's processes do (Owner) -----------------------------------------------------------------

    def ask_to_stop(self, name: str) -> bool:
        """By a signal: the processes hear the head, not this one."""
        self._processes.terminate(name)
        return True

    def instance_ended(self, name: str) -> None:
        self._channel.send(InstanceGone(self._node, name))

    def cannot_go_on(self, reason: str) -> None:
        if not self._broken.done():
            self._broken.set_result(reason)


def _welcome(answer: ToJoiner) -> Welcome:
    if isinstance(answer, NotWelcome):
        raise ClusterError(f"the cluster refuses this node: {answer.reason}")
    if not isinstance(answer, Welcome):
        raise ClusterError(f"expected a welcome, got {type(answer).__name__}")
    return answer
