"""Making the brains of a simulated cluster: the one place that calls `Strategy`."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Final

from kvasir.core.events import InstanceInfo
from kvasir.core.request import Slo
from kvasir.costs.quick import quick
from kvasir.pool.cost_aware import block_seconds
from kvasir.pool.node import PoolNode
from kvasir.pool.policies import EVICTIONS
from kvasir.report.slo import ScaledSlo
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.chunking import BatcherConfig
from kvasir.scheduling.conductor import Conductor
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.strategy import Strategy
from kvasir.simulator.config import SimConfig
from kvasir.simulator.spec import ClusterSpec, MemoryKind, NodeSpec

QUEUED_EACH: Final = 64
"""A cluster of more than a few instances may hold so many requests for each before their prefill is done."""


def conductor(strategy: Strategy, cluster: ClusterSpec, config: SimConfig, slo: Slo | ScaledSlo, rng: Random) -> Conductor:
    is_shared = cluster.memory is MemoryKind.SHARED
    settings = ConductorConfig(
        kv_bytes_per_token=cluster.kv_bytes_per_token,
        block_tokens=cluster.block_tokens,
        load_bandwidth=max((node.ssd_read_bandwidth for node in cluster.nodes if node.ssd_tokens), default=0.0),
        shares_cores=cluster.low_share is not None,
        layerwise=config.layerwise,
        max_stages=cluster.max_stages or (1 if is_shared else len(cluster.instances)),
        stages_on_one_node=is_shared or cluster.stages_on_one_node,
    )
    if config.expected_output_tokens is not None:
        settings = replace(settings, expected_output_tokens=config.expected_output_tokens)
    most = max(settings.max_queued, QUEUED_EACH * len(cluster.instances))
    settings = replace(settings, max_queued=most if config.max_queued is None else config.max_queued)
    return strategy.conductor(settings, cluster.costs, slo, rng)


def batcher(strategy: Strategy, cluster: ClusterSpec, config: SimConfig, info: InstanceInfo, slo: Slo | ScaledSlo) -> Batcher:
    num_pages = info.kv_tokens // cluster.block_tokens
    settings = BatcherConfig(
        block_tokens=cluster.block_tokens,
        max_batch=info.max_batch,
        max_step_tokens=max(BatcherConfig().max_step_tokens, info.max_batch + 1),
        stash_pages=min(config.stash_pages, num_pages // 8),
        max_repeats=config.max_repeats,
    )
    return strategy.batcher(settings, cluster.costs, slo)


def pool(strategy: Strategy, cluster: ClusterSpec, node: NodeSpec) -> PoolNode:
    """`shared` memory: what the node's pool holds is what its instances' pages are."""
    tokens = node.dram_tokens
    if cluster.memory is MemoryKind.SHARED:
        tokens = max([i.kv_tokens for i in cluster.instances if i.node == node.id], default=tokens)
    seconds = block_seconds(quick(cluster.costs), cluster.block_tokens)
    make = EVICTIONS[strategy.eviction]
    return PoolNode(
        tokens // cluster.block_tokens,
        make(seconds),
        ssd_slots=node.ssd_tokens // cluster.block_tokens,
        ssd_eviction=make(seconds) if node.ssd_tokens else None,
        story_length=0,  # a run can be repeated; what thousands of nodes remember takes time
    )
