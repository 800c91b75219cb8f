"""One trace through both bodies: a live cluster in virtual time, and the simulator; their brains are made by the same calls."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from random import Random

from kvasir.cluster.hub import Hub
from kvasir.cluster.service import Rejected, Submission
from kvasir.core.commands import Decision
from kvasir.core.request import Role, Sampling, Slo
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.scheduling.strategy import Strategy
from kvasir.simulator import SimConfig, Simulation, brains
from kvasir.simulator.spec import ClusterSpec, InstanceSpec, MemoryKind, NodeSpec
from kvasir.workload.content import BlockContent
from kvasir.workload.trace import Trace, TraceRequest
from tests.cluster.harness import BLOCK, NODE, SHAPE, SPEC, Brains, answer, cluster
from tests.cluster.virtual_time import run_virtual

COSTS = FittedCost(PrefillFit(1.317e-3, 1.139e-4, 1.71e-9, 1.93e-9), DecodeFit(2.713e-3, 1.171e-4, 1.37e-8), 1e-4, 1e9)
"""Odd figures, so that no two things happen at the same moment by chance."""

ROLES = {"P": Role.PREFILL, "D": Role.DECODE, "M": Role.MIXED}


@dataclass(frozen=True)
class Case:
    """`split` as on the command line: `2P2D1M`. `num_slots` blocks are in the pool of the one node."""

    split: str
    strategy: Strategy
    slo: Slo = field(default_factory=Slo)
    num_slots: int = 4096
    max_batch: int = 16
    low_share: float = 1.0
    max_stages: int = 1

    @property
    def cluster(self) -> ClusterSpec:
        roles = [
            ROLES[letter] for count, letter in zip(self.split[::2], self.split[1::2], strict=True) for _ in range(int(count))
        ]
        kv_tokens = self.num_slots * BLOCK
        return ClusterSpec(
            name="parity",
            nodes=(NodeSpec(NODE, kv_tokens, 1e9),),
            instances=tuple(InstanceSpec(f"i{i}", NODE, role, kv_tokens, self.max_batch) for i, role in enumerate(roles)),
            costs=COSTS,
            kv_bytes_per_token=SHAPE.kv_bytes_per_token,
            num_layers=SHAPE.num_layers,
            block_tokens=BLOCK,
            memory=MemoryKind.SHARED,
            low_share=self.low_share,
            heartbeat_s=0.5,
            max_stages=self.max_stages,
        )


def config(max_repeats: int) -> SimConfig:
    """Clients ask for what they get; nothing overlaps, since nothing moves."""
    return SimConfig(layerwise=False, max_tokens=1, max_repeats=max_repeats, stash_pages=4, sample_s=0.0, keep_decisions=True)


def simulated(case: Case, trace: Trace, *, max_repeats: int) -> tuple[Decision, ...]:
    simulation = Simulation(trace, case.cluster, case.strategy, slo=case.slo, config=config(max_repeats))
    decisions = simulation.run().decisions
    simulation.check()
    assert decisions is not None
    return decisions


def lived(case: Case, trace: Trace) -> list[Decision]:
    """Prompts have the content that the trace's hash ids stand for; every answer is as long as the trace says."""
    decisions: list[Decision] = []
    settings = config(1)
    spec = case.cluster
    made = Brains(
        brains.conductor(case.strategy, spec, settings, case.slo, Random(0)),
        lambda info: brains.batcher(case.strategy, spec, settings, info, case.slo),
        brains.pool(case.strategy, spec, spec.nodes[0]),
        COSTS,
    )
    content = BlockContent(range(1, SPEC.shape.vocab), trace.block_tokens)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        roles = {instance.id: instance.role for instance in spec.instances}
        async with cluster(roles, num_slots=case.num_slots, max_batch=case.max_batch, brains=made) as found:
            found.hub.on_decision = decisions.append
            async with asyncio.TaskGroup() as clients:
                for number, request in enumerate(trace.requests):
                    await asyncio.sleep(request.arrival_s - loop.time())
                    prompt = content.prompt(request)
                    asked = Submission(f"r{number}", prompt, request.output_tokens, Sampling(temperature=0.0), ignore_eos=True)
                    clients.create_task(_client(found.hub, asked))

    run_virtual(scenario())
    return decisions


async def _client(hub: Hub, asked: Submission) -> None:
    with contextlib.suppress(Rejected):
        await answer(hub, asked)


def conversations(seed: int, count: int, *, rate: float) -> Trace:
    """Chats whose turns share prefixes, and a system prompt that all share; no two requests are the same or come together."""
    rng = Random(seed)
    chats: list[list[int]] = []
    now, fresh = 1.0, 1
    requests: list[TraceRequest] = []
    for _ in range(count):
        now += rng.expovariate(rate)
        if not chats or rng.random() < 0.4:
            chats.append([0])
        ids = rng.choice(chats)
        new = rng.randrange(1, 12)
        ids.extend(range(fresh, fresh + new))
        fresh += new
        tokens = (len(ids) - 1) * BLOCK + rng.randrange(1, BLOCK + 1)
        requests.append(TraceRequest(now, tokens, rng.randrange(1, 80), tuple(ids)))
        ids[-1] = fresh  # the next turn completes the last block with other content
        fresh += 1
    return Trace(tuple(requests), BLOCK)
