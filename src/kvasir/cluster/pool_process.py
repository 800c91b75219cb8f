"""The pool process of one node: owns the arena and the PoolNode, answers the node's instances, tells the hub what is here.

python -m kvasir.cluster.pool_process --config pool.json
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from kvasir.cluster.lifeline import child_config, remove_runtime_directory, run_child
from kvasir.cluster.messages import PoolReport, Shutdown
from kvasir.cluster.pool_host import PoolHost
from kvasir.cluster.pool_messages import FromPool, PoolCall, PoolReply, Resync, ToPool
from kvasir.cluster.wire import Channel, Listener, ZmqChannel, ZmqListener
from kvasir.core.errors import KvasirError
from kvasir.core.pool_events import OwnerJoined, OwnerLost, Refused, ReleaseLease
from kvasir.pool.node import PoolNode
from kvasir.store.arena import create_arena
from kvasir.store.prefault import Prefault
from kvasir.telemetry import logs

BAD_SETUP_EXIT = 2
"""Exit status when the pool cannot start for a reason that a restart does not mend; it has said why in one line."""

REPORT_S = 1.0
TICK_S = 0.1
CHECK_S = 5.0


class PoolConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`listen` is where instances connect, `hub` where the hub listens, which knows this process as `name`.

    `runtime_directory` is removed at the end when the parent is gone and cannot do it; None leaves it alone.
    """

    name: str
    node: str
    listen: str
    hub: str
    num_slots: int
    slot_bytes: int
    runtime_directory: str | None = None
    log_level: str = "info"
    log_json: bool = False


class PoolBody:
    """Runs until the hub says Shutdown or its task is cancelled."""

    def __init__(self, host: PoolHost, node: str, *, instances: Listener[PoolCall, PoolReply], hub: Channel[ToPool, FromPool]):
        self._host = host
        self._node = node
        self._instances = instances
        self._hub = hub
        self._flush_due = False
        self._log = structlog.get_logger().bind(part="pool", node=node)
        self.broken_invariants = 0

    async def run(self) -> None:
        self._flush()
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(work()) for work in (self._serve, self._tick, self._report)]
            await self._obey()
            for task in background:
                task.cancel()

    async def _serve(self) -> None:
        """Answer instances. An event must carry its sender's own name."""
        while True:
            peer, call = await self._instances.recv()
            event = call.event
            if event.owner != peer:
                self._log.warning("spoke in another's name, ignored", peer=peer, owner=event.owner)
                continue
            answer = self._host.handle(event)
            self._flush_soon()
            if isinstance(answer, Refused):
                self._log.warning("refused", peer=peer, event_type=type(event).__name__, why=answer.message)
            elif call.id is None:
                continue
            arena = self._host.arena.handle if isinstance(event, OwnerJoined) else None
            if not self._instances.send(peer, PoolReply(call.id, answer, arena)):
                self._log.warning("answer undeliverable", peer=peer, event_type=type(event).__name__)

    async def _obey(self) -> None:
        """Do what the hub says until it says Shutdown."""
        while True:
            match await self._hub.recv():
                case OwnerLost() | ReleaseLease() as event:
                    self._host.handle(event)
                    self._flush_soon()
                case Resync():
                    self._host.start_over()
                    self._flush_soon()
                case Shutdown():
                    return

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._host.tick()
            self._flush()

    async def _report(self) -> None:
        since_check = 0.0
        while True:
            self._hub.send(PoolReport(self._node, replace(self._host.node.stats(), broken_invariants=self.broken_invariants)))
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
    host = PoolHost(config.node, PoolNode(config.num_slots), arena, asyncio.get_running_loop().time)
    hub: ZmqChannel[ToPool, FromPool] = ZmqChannel(config.hub, config.name, msgspec.msgpack.Decoder(ToPool))
    try:
        instances: ZmqListener[PoolCall, PoolReply] = ZmqListener(config.listen, msgspec.msgpack.Decoder(PoolCall))
        prefault = Prefault(arena)
        try:
            await PoolBody(host, config.node, instances=instances, hub=hub).run()
        finally:
            prefault.stop()
            instances.close()
    finally:
        hub.close()


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
