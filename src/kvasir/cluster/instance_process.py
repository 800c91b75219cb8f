"""An instance process: `python -m kvasir.cluster.instance_process`, started by the launcher."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

import msgspec
from msgspec import Struct

from kvasir.cluster.config import ServeConfig
from kvasir.cluster.instance import InstanceBody
from kvasir.cluster.lifeline import child_config, run_child
from kvasir.cluster.messages import FromInstance, Progress, ToInstance
from kvasir.cluster.pool_client import open_pool
from kvasir.cluster.warm_up import warm_up
from kvasir.cluster.wire import ZmqChannel
from kvasir.core.errors import ConfigError, KvasirError, ModelError, root_cause
from kvasir.core.events import InstanceInfo
from kvasir.core.request import Role
from kvasir.core.units import parse_duration
from kvasir.costs.fitted import FittedCost
from kvasir.costs.roofline import RooflineCost
from kvasir.engine.fake import FakeEngine
from kvasir.engine.interface import Engine, ModelSpec
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.chunking import BatcherConfig
from kvasir.scheduling.strategy import LIVE_SHARE
from kvasir.telemetry import logs

BAD_SETUP_EXIT = 2
"""Exit status of an instance that cannot start for a reason that a restart does not mend; it has said why in one line."""


class InstanceSetup(Struct, frozen=True):
    """Everything that an instance process is told when it starts; it is the node's instance of this `number`, from 0."""

    info: InstanceInfo
    number: int
    spec: ModelSpec
    costs: FittedCost | RooflineCost
    num_slots: int
    hub_address: str
    pool_address: str
    config: ServeConfig


async def run_instance(setup: InstanceSetup) -> None:
    """Load the model, join the pool, say hello, work until told to stop."""
    info = setup.info
    logs.setup(setup.config.log_level, json=setup.config.log_json)
    channel: ZmqChannel[ToInstance, FromInstance] = ZmqChannel(setup.hub_address, info.id, msgspec.msgpack.Decoder(ToInstance))
    engine = await _load_engine(setup, lambda fraction, what: channel.send(Progress(info.id, fraction, what)))
    try:
        async with open_pool(setup.pool_address, info.id, info.epoch) as pool:
            engine.attach(await pool.join())
            batcher = Batcher(_batcher_config(setup), setup.costs)
            channel.send(Progress(info.id, 1.0, "warming up"))
            await warm_up(engine, pool, batcher, chunk_tokens=setup.config.chunk_tokens, max_batch=setup.config.max_batch)
            max_gap_s = parse_duration(setup.config.slo_tbt) / 2
            body = InstanceBody(
                info,
                engine,
                batcher,
                pool,
                max_gap_s=max_gap_s,
                chunk_tokens=setup.config.chunk_tokens,
                receive=channel.recv,
                send=channel.send,
            )
            await body.run()
    finally:
        await engine.close()
        channel.close()


async def _load_engine(setup: InstanceSetup, on_progress: Callable[[float, str], object]) -> Engine:
    if setup.config.engine == "fake":
        return FakeEngine(setup.spec, setup.costs)
    from kvasir.engine.torch.engine import TorchEngine

    loop = asyncio.get_running_loop()

    def report(fraction: float, what: str) -> None:
        loop.call_soon_threadsafe(on_progress, fraction, what)

    return await TorchEngine.load(
        setup.spec,
        device=setup.config.device,
        number=setup.number,
        of=sum(setup.config.split),
        low_priority=setup.info.role is Role.PREFILL and setup.config.device == "cpu",
        on_progress=report,
    )


def stash_pages(num_slots: int, config: ServeConfig) -> int:
    """How many pages an idle instance keeps in its hand: few enough that all hands together leave the pool usable."""
    return min(32, num_slots // (8 * sum(config.split)))


def _batcher_config(setup: InstanceSetup) -> BatcherConfig:
    config = setup.config
    return BatcherConfig(
        block_tokens=setup.spec.block_tokens,
        max_batch=config.max_batch,
        max_step_tokens=config.chunk_tokens,
        stash_pages=stash_pages(setup.num_slots, config),
        max_step_s=LIVE_SHARE * parse_duration(config.slo_tbt),
    )


def main() -> None:
    setup, lifeline = child_config(InstanceSetup)
    try:
        run_child(lambda: run_instance(setup), lifeline)
    except (KvasirError, BaseExceptionGroup) as error:
        cause = root_cause(error)
        if not isinstance(cause, KvasirError):
            raise
        print(f"kvasir: {setup.info.id}: {cause}", file=sys.stderr)
        sys.exit(BAD_SETUP_EXIT if isinstance(cause, ModelError | ConfigError) else 1)


if __name__ == "__main__":
    main()
