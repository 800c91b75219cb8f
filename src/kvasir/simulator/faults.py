"""What goes wrong in a simulated cluster, as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from random import Random

from msgspec import Struct

from kvasir.core.errors import ConfigError
from kvasir.simulator.spec import ClusterSpec


class FaultKind(StrEnum):
    """`instance`: its process dies. `node`: all of its instances and its DRAM; SSD survives. `slow-nic`: its network."""

    INSTANCE = "instance"
    NODE = "node"
    SLOW_NIC = "slow-nic"


class Fault(Struct, frozen=True):
    """At `at_s` `target` (an instance or node id) fails, for `duration_s`; `factor` is the share of bandwidth that is left."""

    at_s: float
    kind: FaultKind
    target: str
    duration_s: float
    factor: float = 0.1


def fault_plan(
    rng: Random, cluster: ClusterSpec, *, span_s: float, count: int, mean_duration_s: float = 30.0
) -> tuple[Fault, ...]:
    """`count` faults of any kind at random times in [0, `span_s`], in order; equal seeds give equal plans."""
    instances = sorted(instance.id for instance in cluster.instances)
    nodes = sorted(node.id for node in cluster.nodes)
    faults = []
    for _ in range(count):
        kind = rng.choice(list(FaultKind))
        target = rng.choice(instances if kind is FaultKind.INSTANCE else nodes)
        faults.append(Fault(rng.uniform(0.0, span_s), kind, target, rng.expovariate(1.0 / mean_duration_s)))
    return tuple(sorted(faults, key=lambda fault: (fault.at_s, fault.target)))


def check_faults(faults: Sequence[Fault], cluster: ClusterSpec) -> None:
    """Raises ConfigError for a target that does not exist, or a factor or duration that cannot be."""
    instances = {instance.id for instance in cluster.instances}
    nodes = {node.id for node in cluster.nodes}
    for fault in faults:
        known = instances if fault.kind is FaultKind.INSTANCE else nodes
        if fault.target not in known:
            raise ConfigError(
                f"fault: got target {fault.target!r} for kind {fault.kind.value}, expected one of {sorted(known)}"
            )
        if not (0 <= fault.at_s < math.inf and fault.duration_s >= 0 and 0 < fault.factor <= 1):
            raise ConfigError(f"fault: expected a time at_s, duration_s of at least 0 and 0 < factor <= 1, got {fault}")
