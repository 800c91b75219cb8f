"""A recorded live run, through its file, replays to the same commands: with clients that leave and an instance that dies."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from random import Random

import msgspec
import pytest

from kvasir.cluster.hub import Hub
from kvasir.cluster.service import Rejected, Submission
from kvasir.core.commands import Cancel, Prefill, Reject, ShareCores
from kvasir.core.errors import ConfigError
from kvasir.core.events import Aborted, Event, InstanceInfo, InstanceLost
from kvasir.core.request import Role, Slo
from kvasir.pool.node import PoolNode
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.chunking import BatcherConfig
from kvasir.scheduling.conductor import Conductor
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.recording import ConductorSetup, Recorded, Said, heard, line_of, read_recording, replay
from kvasir.workload.content import BlockContent
from tests.cluster.harness import BLOCK, COSTS, SHAPE, SPEC, Brains, answer, cluster, submission
from tests.cluster.virtual_time import run_virtual
from tests.parity.both import conversations

ROLES = {"d0": Role.DECODE, "m0": Role.MIXED, "p0": Role.PREFILL, "p1": Role.PREFILL}
SETUP = ConductorSetup(
    policy="random",
    admission="slo",
    roles=None,
    chunk_tokens=64,
    config=ConductorConfig(kv_bytes_per_token=SHAPE.kv_bytes_per_token, block_tokens=BLOCK, shares_cores=True),
    costs=COSTS,
    slo=Slo(1.0, 0.02),
    seed=7,
)
BATCHER = BatcherConfig(block_tokens=BLOCK, max_batch=8, max_step_tokens=64, stash_pages=4, max_step_s=0.02)
NUM_SLOTS = 192
NUM_REQUESTS = 120


class Ears:
    """Writes down what brains are told, and hears what they say. An instance that starts again has a new brain."""

    def __init__(self) -> None:
        self.lines = [line_of(SETUP)]
        self.said: dict[str, list[Sequence[Said]]] = defaultdict(list)
        self._epochs: dict[str, int] = {}

    def hear(self, name: str, event: Event, now: float) -> None:
        self.lines.append(heard(self._called(name), event, now))

    def conductor(self) -> Conductor:
        conductor = SETUP.make()
        self._overhear("conductor", conductor)
        return conductor

    def batcher(self, info: InstanceInfo) -> Batcher:
        self._epochs[info.id] = info.epoch
        batcher = Batcher(BATCHER, COSTS)
        self._overhear(self._called(info.id), batcher)
        return batcher

    def _called(self, name: str) -> str:
        return f"{name}/{self._epochs[name]}" if name in self._epochs else name

    def _overhear(self, name: str, brain: Conductor | Batcher) -> None:
        said, handle = self.said[name], brain.handle

        def spoken(event: Event, now: float) -> Sequence[Said]:
            said.append(handle(event, now))
            return said[-1]

        brain.handle = spoken  # type: ignore[method-assign, assignment]


async def live_run(ears: Ears) -> None:
    """Traffic that is too much for the cluster; some clients leave, and an instance dies at work and comes back."""
    brains = Brains(ears.conductor(), ears.batcher, PoolNode(NUM_SLOTS))
    content = BlockContent(range(1, SPEC.shape.vocab), BLOCK)
    rng = Random(0)
    async with cluster(ROLES, num_slots=NUM_SLOTS, max_batch=8, brains=brains, hear=ears.hear) as found:
        async with asyncio.TaskGroup() as clients:
            for number, request in enumerate(conversations(seed=2, count=NUM_REQUESTS, rate=25.0).requests):
                await asyncio.sleep(request.arrival_s - asyncio.get_running_loop().time())
                asked = submission(f"r{number}", content.prompt(request), request.output_tokens)
                clients.create_task(client(found.hub, asked, patience_s=rng.uniform(0.0, 3.0)))
                if number == NUM_REQUESTS // 2:
                    found.kill("p0")
                    found.start("p0", Role.PREFILL, 2)
        await asyncio.sleep(5.0)


async def client(hub: Hub, asked: Submission, patience_s: float) -> None:
    try:
        async with asyncio.timeout(patience_s):
            await answer(hub, asked)
    except (Rejected, TimeoutError):
        return


def test_a_recording_replays_to_the_same_commands() -> None:
    ears = Ears()
    run_virtual(live_run(ears))
    setup, *records = read_recording(ears.lines)
    told: dict[str, list[Recorded]] = defaultdict(list)
    for record in records:
        assert isinstance(record, Recorded)
        told[record.brain].append(record)
    assert told.keys() == ears.said.keys() == {"conductor", "d0/1", "m0/1", "p0/1", "p0/2", "p1/1"}

    assert isinstance(setup, ConductorSetup)
    for name, said in ears.said.items():
        brain = setup.make() if name == "conductor" else Batcher(BATCHER, COSTS)
        assert replay(brain, told[name]) == said, name

    events = {type(record.event) for record in told["conductor"]}
    commands = {type(command) for said in ears.said.values() for commands in said for command in commands}
    assert {Aborted, InstanceLost} <= events, "the run must have had what replays could get wrong"
    assert {Prefill, Reject, Cancel, ShareCores} <= commands


def test_another_conductor_would_say_something_else() -> None:
    ears = Ears()
    run_virtual(live_run(ears))
    records = [record for record in read_recording(ears.lines) if isinstance(record, Recorded) and record.brain == "conductor"]
    other = msgspec.structs.replace(SETUP, seed=SETUP.seed + 1)
    assert replay(other.make(), records) != ears.said["conductor"]


@pytest.mark.parametrize("line", [b"", b"{}", b'{"type": "Recorded", "brain": "conductor", "at_s": "soon"}', b"\xff"])
def test_a_line_that_is_none_is_named(line: bytes) -> None:
    with pytest.raises(ConfigError, match="recording line 2: "):
        list(read_recording([line_of(SETUP), line]))
