"""The cluster behind the published comparison tables: LLaMA3-70B on nodes of 8 x A800 (BENCHMARKS 4)."""

from __future__ import annotations

from kvasir.core.request import Role
from kvasir.costs.roofline import reference_cost
from kvasir.simulator.spec import ClusterSpec, InstanceSpec, NodeSpec


def paper_cluster(prefill: int = 8, decode: int = 8, *, mixed: int = 0) -> ClusterSpec:
    """One instance a node, 3M tokens of DRAM each, 80 GB/s between nodes."""
    roles = [Role.PREFILL] * prefill + [Role.DECODE] * decode + [Role.MIXED] * mixed
    return ClusterSpec(
        name=f"paper-{len(roles)}",
        nodes=tuple(NodeSpec(f"node{i:04}", 3_000_000, 80e9) for i in range(len(roles))),
        instances=tuple(
            InstanceSpec(f"{role.value}-{i:04}", f"node{i:04}", role, 1_500_000, 512) for i, role in enumerate(roles)
        ),
        costs=reference_cost(),
        kv_bytes_per_token=327_680,
        num_layers=80,
    )
