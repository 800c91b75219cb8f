"""From a cluster file's text to a `ClusterSpec`; everything that cannot work is one line of error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.resources import files

from msgspec import convert
from msgspec.structs import asdict, replace

from kvasir.core.errors import ConfigError
from kvasir.core.units import format_size
from kvasir.costs.fitted import FittedCost
from kvasir.costs.hardware import HARDWARE, Hardware
from kvasir.costs.roofline import RooflineCost
from kvasir.costs.shape import ModelShape
from kvasir.costs.shapes import SHAPES
from kvasir.simulator.clusters.file import ClusterTable, HardwareTable, ModelTable, NodeTable, ProfileTable, nearest, parse
from kvasir.simulator.clusters.quantities import at_least_one, num_bytes, positive, rate, seconds, tokens
from kvasir.simulator.clusters.split import roles_of
from kvasir.simulator.spec import ClusterSpec, InstanceSpec, MemoryKind, NodeSpec

_MUST = ("devices", "flops", "memory_bandwidth", "memory_bytes", "network_bandwidth")
_SIZES = ("memory_bytes", "dram_bytes", "ssd_bytes")
_RATES = ("memory_bandwidth", "network_bandwidth", "ssd_read_bandwidth", "ssd_write_bandwidth")


def shipped_names() -> tuple[str, ...]:
    """The clusters that come with the package."""
    return tuple(sorted(f.name.removesuffix(".toml") for f in files(__package__).iterdir() if f.name.endswith(".toml")))


def load_cluster(
    name_or_text: str,
    *,
    model_at: Callable[[str], ModelShape] | None = None,
    profile_at: Callable[[str], FittedCost] | None = None,
) -> ClusterSpec:
    """The shipped cluster of that name, or the one that a TOML text describes. Raises ConfigError.

    Files that the text names are read by `model_at` (a checkpoint directory) and `profile_at` (a fitted cost model).
    """
    is_text = "=" in name_or_text or "\n" in name_or_text
    table = parse(name_or_text if is_text else _shipped(name_or_text))
    try:
        return _cluster(table, model_at, profile_at)
    except ConfigError as error:
        raise ConfigError(f"cluster {table.name}: {error}") from error


def _shipped(name: str) -> str:
    known = shipped_names()
    if name not in known:
        raise ConfigError(f"no cluster {name!r}; a TOML file, or one of {', '.join(known)}{nearest(name, list(known))}")
    return (files(__package__) / f"{name}.toml").read_text("utf-8")


def _cluster(
    table: ClusterTable, model_at: Callable[[str], ModelShape] | None, profile_at: Callable[[str], FittedCost] | None
) -> ClusterSpec:
    for key in ("instances", "block_tokens", "max_batch"):
        at_least_one(key, getattr(table, key))
    if table.stages is not None:
        at_least_one("stages", table.stages)
    shape = _model(table.model, model_at)
    node_hardware = _with_network(_hardware(table.hardware), table)
    per_instance = _share(node_hardware, table.instances)
    nodes = tuple(_nodes(table, node_hardware, shape.kv_bytes_per_token))
    memory = _memory(table.memory)
    return ClusterSpec(
        name=table.name,
        nodes=nodes,
        instances=_instances(table, nodes, _hbm_tokens(shape, per_instance, memory)),
        costs=_costs(table.costs, shape, per_instance, profile_at),
        kv_bytes_per_token=shape.kv_bytes_per_token,
        num_layers=shape.num_layers,
        block_tokens=table.block_tokens,
        memory=memory,
        heartbeat_s=positive("heartbeat", seconds("heartbeat", table.heartbeat)),
        report_delay_s=seconds("report_delay", table.report_delay),
        hand_off_s=seconds("hand_off", table.hand_off),
        step_noise=tuple(positive("step_noise", factor) for factor in table.step_noise),
        max_stages=table.stages,
        stages_on_one_node=table.stages_on_one_node,
    )


def _model(model: str | ModelTable, model_at: Callable[[str], ModelShape] | None) -> ModelShape:
    if isinstance(model, ModelTable):
        for key, value in asdict(model).items():
            at_least_one(f"model.{key}", value)
        return ModelShape(**asdict(model))
    if model in SHAPES:
        return SHAPES[model]
    if model_at is None or not ("/" in model or model.startswith(".")):
        known = ", ".join(SHAPES)
        hint = nearest(model, list(SHAPES)) or f"; known are {known}, or a checkpoint's directory (./NAME) or its sizes"
        raise ConfigError(f"unknown model {model!r}{hint}")
    return model_at(model)


def _hardware(hardware: str | HardwareTable) -> Hardware:
    if isinstance(hardware, str):
        return _named_hardware(hardware)
    values = {key: _quantity(key, v) for key, v in asdict(hardware).items() if v is not None and key != "base"}
    for key, value in values.items():
        if not isinstance(value, str) and not _is_possible(key, value):
            most = " and at most 1" if key.endswith("_efficiency") else ""
            raise ConfigError(f"hardware.{key}: got {value:g}, expected more than 0{most}")
    if hardware.base is not None:
        return replace(_named_hardware(hardware.base), **values)
    for key in _MUST:
        if key not in values:
            raise ConfigError(f"hardware.{key} is missing (or give a base: {', '.join(HARDWARE)})")
    return convert({"name": "custom", "source": "the cluster file", **values}, Hardware)


def _is_possible(key: str, value: float) -> bool:
    if key.endswith("_efficiency"):
        return 0 < value <= 1
    can_be_zero = key.endswith("_s") or key.startswith(("ssd_", "dram_"))
    return math.isfinite(value) and (value > 0 or (value == 0 and can_be_zero))


def _named_hardware(name: str) -> Hardware:
    if name not in HARDWARE:
        hint = nearest(name, list(HARDWARE)) or f"; known are {', '.join(HARDWARE)}, or a table"
        raise ConfigError(f"unknown hardware {name!r}{hint}")
    return HARDWARE[name]


def _quantity(key: str, value: object) -> int | float | str:
    if key in _SIZES:
        return num_bytes(f"hardware.{key}", value)
    return rate(f"hardware.{key}", value) if key in _RATES else value  # type: ignore[return-value]  # typed by the table


def _with_network(hardware: Hardware, table: ClusterTable) -> Hardware:
    """The file's own `network` goes before the hardware's, for the cost model too."""
    if table.network is not None:
        hardware = replace(hardware, network_bandwidth=positive("network", rate("network", table.network)))
    if table.network_latency is not None:
        hardware = replace(hardware, network_latency_s=seconds("network_latency", table.network_latency))
    return hardware


def _share(hardware: Hardware, instances: int) -> Hardware:
    """An instance's part of its node: whole devices. Instances on a single device all see the whole of it."""
    if hardware.devices == 1 or instances == 1:
        return hardware
    if hardware.devices % instances:
        raise ConfigError(f"instances: got {instances}, expected a divisor of the {hardware.devices} devices of a node")
    return replace(hardware, devices=hardware.devices // instances)


def _memory(text: str) -> MemoryKind:
    if text not in list(MemoryKind):
        raise ConfigError(f"memory: got {text!r}, expected {' or '.join(MemoryKind)}")
    return MemoryKind(text)


def _hbm_tokens(shape: ModelShape, hardware: Hardware, memory: MemoryKind) -> int | None:
    """Tokens of KV beside the weights in an instance's own memory; None where pages are the node's slots."""
    room = hardware.devices * hardware.memory_bytes
    left = room - shape.weight_bytes
    if left < shape.kv_bytes_per_token:
        weights = format_size(shape.weight_bytes)
        raise ConfigError(
            f"the model's weights ({weights}) do not fit an instance's memory ({format_size(room)}); "
            "a smaller model, more memory, or fewer instances per node"
        )
    return None if memory is MemoryKind.SHARED else left // shape.kv_bytes_per_token


def _nodes(table: ClusterTable, hardware: Hardware, kv_bytes: int) -> Iterator[NodeSpec]:
    groups = [NodeTable(count=table.nodes)] if isinstance(table.nodes, int) else table.nodes
    for group in groups:
        at_least_one("nodes", group.count)
    total = sum(group.count for group in groups)
    at_least_one("nodes", total)
    width = len(str(total - 1))
    number = 0
    for group in groups:
        for _ in range(group.count):
            yield _node(f"n{number:0{width}d}", group, table, hardware, kv_bytes)
            number += 1


def _node(node_id: str, group: NodeTable, table: ClusterTable, hardware: Hardware, kv_bytes: int) -> NodeSpec:
    def either(of_group: float | str | None, of_file: float | str | None, of_hardware: float) -> float | str:
        return of_group if of_group is not None else of_file if of_file is not None else of_hardware

    dram = either(group.dram, table.dram, hardware.dram_bytes or -1)
    if dram == -1 and group.dram is None and table.dram is None:
        raise ConfigError("dram is missing; write for example 3Mtok or 1TiB")
    ssd_tokens = tokens("ssd", either(group.ssd, table.ssd, 0), kv_bytes)
    read_rate = rate("ssd_read", either(group.ssd_read, table.ssd_read, hardware.ssd_read_bandwidth))
    write_rate = rate("ssd_write", either(group.ssd_write, table.ssd_write, hardware.ssd_write_bandwidth))
    if ssd_tokens and not (read_rate and write_rate):
        raise ConfigError("an SSD needs ssd_read and ssd_write, as in 6.8GB/s")
    return NodeSpec(
        id=node_id,
        dram_tokens=tokens("dram", dram, kv_bytes),
        network_bandwidth=positive("network", rate("network", either(group.network, None, hardware.network_bandwidth))),
        network_latency_s=seconds("network_latency", either(group.network_latency, None, hardware.network_latency_s)),
        ssd_tokens=ssd_tokens,
        ssd_read_bandwidth=read_rate if ssd_tokens else 0.0,
        ssd_write_bandwidth=write_rate if ssd_tokens else 0.0,
    )


def _instances(table: ClusterTable, nodes: tuple[NodeSpec, ...], hbm_tokens: int | None) -> tuple[InstanceSpec, ...]:
    places = [node for node in nodes for _ in range(table.instances)]
    roles = roles_of(table.split, len(places))
    width = len(str(len(places) - 1))
    return tuple(
        InstanceSpec(
            id=f"i{number:0{width}d}",
            node=node.id,
            role=role,
            kv_tokens=_kv_tokens(table, node, hbm_tokens),
            max_batch=table.max_batch,
        )
        for number, (node, role) in enumerate(zip(places, roles, strict=True))
    )


def _kv_tokens(table: ClusterTable, node: NodeSpec, hbm_tokens: int | None) -> int:
    """An instance's room for KV: less than two blocks serve no prompt."""
    found, where = (node.dram_tokens, "dram") if hbm_tokens is None else (hbm_tokens, "an instance's memory beside the weights")
    needed = 2 * table.block_tokens
    if found < needed:
        raise ConfigError(f"{where}: got room for {found} tokens of KV, expected at least two blocks ({needed})")
    return found


def _costs(
    costs: str | ProfileTable, shape: ModelShape, hardware: Hardware, profile_at: Callable[[str], FittedCost] | None
) -> FittedCost | RooflineCost:
    if isinstance(costs, ProfileTable):
        if profile_at is None:
            raise ConfigError(f"costs: cannot read profile {costs.profile} here")
        return profile_at(costs.profile)
    if costs not in ("roofline", "reference"):
        raise ConfigError(f"costs: got {costs!r}, expected roofline, reference or {{ profile = 'file.json' }}")
    return RooflineCost(shape, hardware, one_bound_each=costs == "reference")
