"""What a simulated cluster is made of. Sizes are in tokens of KV, rates in bytes per second, times in seconds."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from kvasir.core.request import Role
from kvasir.costs.fitted import FittedCost
from kvasir.costs.roofline import RooflineCost


class MemoryKind(StrEnum):
    """Where an instance's pages are.

    `device`: in the instance's own memory (HBM); the node's DRAM pool holds copies of blocks, loaded and stored layer by layer.
    `shared`: pages are the pool's slots, as on a CPU node, whose instances all map one arena.
    """

    DEVICE = "device"
    SHARED = "shared"


class NodeSpec(Struct, frozen=True):
    """One machine: its part of the KVCache pool, and its network, the same in each direction."""

    id: str
    dram_tokens: int
    network_bandwidth: float
    network_latency_s: float = 0.0
    ssd_tokens: int = 0
    ssd_read_bandwidth: float = 0.0
    ssd_write_bandwidth: float = 0.0


class InstanceSpec(Struct, frozen=True):
    """One instance: `kv_tokens` is what its pages hold (of a `shared` node: what the node's pool holds)."""

    id: str
    node: str
    role: Role
    kv_tokens: int
    max_batch: int


class ClusterSpec(Struct, frozen=True):
    """A cluster, complete: nodes, instances, and the costs that all instances have in common.

    Instances report their load every `heartbeat_s`, and the report is `report_delay_s` old when it arrives.
    With a `low_share` the instances of a node compute on the same cores, prefill instances at low priority: this is their
    share of the cores while another instance of the node computes (`simulator/cores.py`); 1 if they do not disturb each other.
    The other then has `normal_share` of its undisturbed speed.
    A pipeline has at most `max_stages` (None: what the policy makes of it; 1 where memory is shared), all on one node with
    `stages_on_one_node`, as live. With shared memory they always are, and write into the same pages.
    A hand-off takes `hand_off_s` after its last byte, for messages. A step takes as many times as long as it costs as one of
    `step_noise` says, drawn anew for each; without any, what it costs.
    """

    name: str
    nodes: tuple[NodeSpec, ...]
    instances: tuple[InstanceSpec, ...]
    costs: FittedCost | RooflineCost
    kv_bytes_per_token: int
    num_layers: int
    block_tokens: int = 512
    memory: MemoryKind = MemoryKind.DEVICE
    heartbeat_s: float = 1.0
    report_delay_s: float = 0.0
    low_share: float | None = None
    normal_share: float = 1.0
    hand_off_s: float = 0.0
    step_noise: tuple[float, ...] = ()
    max_stages: int | None = None
    stages_on_one_node: bool = False
