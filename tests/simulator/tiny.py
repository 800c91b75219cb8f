"""Clusters and traces small enough to be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from kvasir.core.request import Role, Slo
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.scheduling.strategy import Strategy, strategy
from kvasir.simulator import SimConfig, Simulation
from kvasir.simulator.faults import Fault
from kvasir.simulator.run import Run
from kvasir.simulator.spec import ClusterSpec, InstanceSpec, MemoryKind, NodeSpec
from kvasir.workload.trace import Trace, TraceRequest

BLOCK = 100
TOKEN_BYTES = 10
BANDWIDTH = 100_000.0
"""A token passes in 0.1 ms, a block in 10 ms."""

COSTS = FittedCost(PrefillFit(0.0, 1e-3, 0.0, 0.0), DecodeFit(0.02, 0.0, 1e-5), 0.0, BANDWIDTH)
"""A millisecond a prompt token; a decode pass takes 20 ms and 10 us a context token."""

FLAT = FittedCost(PrefillFit(0.0, 1e-3, 0.0, 0.0), DecodeFit(0.02, 0.0, 0.0), 0.0, BANDWIDTH)
"""Every decode pass takes 20 ms."""


def cluster(
    roles: Sequence[Role],
    *,
    kv_tokens: int = 100_000,
    dram_tokens: int = 100_000,
    memory: MemoryKind = MemoryKind.DEVICE,
    costs: FittedCost = COSTS,
    num_layers: int = 10,
    same_node: bool = False,
    max_batch: int = 16,
    ssd_tokens: int = 0,
) -> ClusterSpec:
    """Instance i0 on node n0 and so on, or all of them on n0."""
    count = 1 if same_node else len(roles)
    return ClusterSpec(
        name="tiny",
        nodes=tuple(
            NodeSpec(f"n{i}", dram_tokens, BANDWIDTH, 0.0, ssd_tokens, BANDWIDTH / 2, BANDWIDTH / 2) for i in range(count)
        ),
        instances=tuple(
            InstanceSpec(f"i{i}", "n0" if same_node else f"n{i}", role, kv_tokens, max_batch) for i, role in enumerate(roles)
        ),
        costs=costs,
        kv_bytes_per_token=TOKEN_BYTES,
        num_layers=num_layers,
        block_tokens=BLOCK,
        memory=memory,
    )


def trace(*requests: tuple[float, int, int, Sequence[int]]) -> Trace:
    """(arrival, prompt tokens, output tokens, hash ids)."""
    return Trace(tuple(TraceRequest(at, n, out, tuple(ids)) for at, n, out, ids in requests), BLOCK)


def random_trace(seed: int, count: int, *, rate: float = 4.0) -> Trace:
    """Conversations whose turns share prefixes."""
    rng = Random(seed)
    chats: list[list[int]] = []
    now, fresh, requests = 0.0, 1, []
    for _ in range(count):
        now += rng.expovariate(rate)
        if not chats or rng.random() < 0.4:
            chats.append([0])
        ids = rng.choice(chats)
        new = rng.randrange(1, 6)
        ids.extend(range(fresh, fresh + new))
        fresh += new
        tokens = (len(ids) - 1) * BLOCK + rng.randrange(1, BLOCK + 1)
        requests.append((now, tokens, rng.randrange(1, 60), tuple(ids)))
        ids[-1] = fresh  # the next turn completes the last block with other content
        fresh += 1
        if len(ids) > 30:
            chats.remove(ids)
    return trace(*requests)


def play(
    played: Trace,
    spec: ClusterSpec,
    policy: Strategy | str = "mooncake",
    *,
    config: SimConfig | None = None,
    faults: Sequence[Fault] = (),
    slo: Slo | None = None,
    seed: int = 0,
) -> Run:
    """Run it, check every invariant afterwards, and that every request has its outcome."""
    chosen = strategy(policy).with_parts(admission="off") if isinstance(policy, str) else policy
    simulation = Simulation(played, spec, chosen, slo=slo or Slo(), seed=seed, faults=faults, config=config)
    run = simulation.run()
    simulation.check()
    assert len(run.records.status) == len(played.requests)
    return run
