"""Metric families of the KVCache pool: tiers, look-ups, evictions, transfers, tenants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec.structs import asdict
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvasir.core.pool_events import PoolStats
from kvasir.core.tier import Tier
from kvasir.core.usage import TenantUsage, TransportUsage

STATES = ("free", "reserved", "private", "published", "leased", "loading", "spilling", "fetching", "pinned")
"""Slots of the arena by what they are now; `leased` and `pinned` ones are published as well."""

_OTHER_GAUGES = frozenset({"slots", "leases", "owners", "ssd_slots", "ssd_free", "ssd_published", "writing", "spills_waiting"})

_EVICTIONS = (
    (Tier.DRAM, "quota", "quota_evictions"),
    (Tier.DRAM, "demoted", "demotions"),
    (Tier.DRAM, "unwritten", "dropped"),
    (Tier.SSD, "space", "ssd_evictions"),
    (Tier.SSD, "failed_read", "failed_loads"),
    (Tier.SSD, "failed_write", "failed_spills"),
)
"""Tier, reason, and the count that tells it."""


def used_slots(stats: PoolStats) -> int:
    """Slots that cannot be had by evicting: what requests read, fill or keep to themselves."""
    return stats.reserved + stats.private + stats.leased


def tier_blocks(stats: PoolStats) -> dict[Tier, tuple[int, int]]:
    """Blocks that can be read, and slots, of each tier that the node has."""
    tiers = {Tier.DRAM: (stats.published, stats.slots)}
    return tiers | {Tier.SSD: (stats.ssd_published, stats.ssd_slots)} if stats.ssd_slots else tiers


def misses(stats: PoolStats) -> int:
    """Blocks that were looked up and were in no tier of the node."""
    return max(0, stats.lookups - stats.hits - stats.ssd_hits)


def pool_families(pools: Mapping[str, PoolStats], block_bytes: int) -> Iterator[Metric]:
    """`block_bytes` is what one block takes."""
    ordered = sorted(pools.items())
    yield from _tiers(ordered, block_bytes)
    yield from _states(ordered)
    yield from _lookups(ordered)
    yield from _counters(ordered)


def transfer_families(transports: Mapping[str, Sequence[TransportUsage]]) -> Iterator[Metric]:
    labels = ["node", "transport"]
    counters = [
        (CounterMetricFamily(f"kvasir_transfer_{name}", text, labels=labels), name)
        for name, text in (
            ("bytes", "KVCache bytes that the node read from others"),
            ("transfers", "Reads from other nodes"),
            ("failures", "Reads from other nodes that failed"),
            ("retries", "Reads that were tried again on another path"),
            ("seconds", "Seconds that reads took, summed"),
        )
    ]
    queued = GaugeMetricFamily("kvasir_transfer_queue_length", "Reads that wait for their turn", labels=labels)
    for node, found in sorted(transports.items()):
        for stats in found:
            values = asdict(stats)
            for family, name in counters:
                family.add_metric([node, stats.name], values[name])
            queued.add_metric([node, stats.name], stats.queued)
    yield from (*(family for family, _ in counters), queued)


def tenant_families(tenants: Mapping[str, Sequence[TenantUsage]]) -> Iterator[Metric]:
    labels = ["node", "tenant"]
    blocks = GaugeMetricFamily("kvasir_tenant_blocks", "Blocks of the tenant in the node's DRAM", labels=labels)
    quotas = GaugeMetricFamily("kvasir_tenant_quota_blocks", "Blocks that the tenant may have there", labels=labels)
    for node, found in sorted(tenants.items()):
        for usage in found:
            blocks.add_metric([node, usage.tenant], usage.blocks)
            if usage.quota is not None:
                quotas.add_metric([node, usage.tenant], usage.quota)
    yield from (blocks, quotas)


Pools = list[tuple[str, PoolStats]]


def _tiers(pools: Pools, block_bytes: int) -> Iterator[Metric]:
    labels = ["node", "tier"]
    blocks = GaugeMetricFamily("kvasir_pool_blocks", "Blocks that can be read", labels=labels)
    used = GaugeMetricFamily("kvasir_pool_bytes", "Bytes of the blocks that can be read", labels=labels)
    capacity = GaugeMetricFamily("kvasir_pool_capacity_bytes", "Bytes of KVCache that the tier can hold", labels=labels)
    for node, stats in pools:
        for tier, (held, slots) in tier_blocks(stats).items():
            blocks.add_metric([node, tier.value], held)
            used.add_metric([node, tier.value], held * block_bytes)
            capacity.add_metric([node, tier.value], slots * block_bytes)
    yield from (blocks, used, capacity)


def _states(pools: Pools) -> Iterator[Metric]:
    usage = GaugeMetricFamily(
        "kvasir_kv_cache_usage_perc", "Share of the node's slots that requests hold (0 to 1)", labels=["node"]
    )
    slots = GaugeMetricFamily("kvasir_pool_slots", "Slots of the node's arena", labels=["node", "state"])
    leases = GaugeMetricFamily("kvasir_pool_leases", "Open leases", labels=["node"])
    spills = GaugeMetricFamily("kvasir_pool_spill_queue_length", "Blocks that wait to be written to the SSD", labels=["node"])
    writing = GaugeMetricFamily("kvasir_pool_writing_blocks", "Blocks that are being written to the SSD", labels=["node"])
    for node, stats in pools:
        values = _numbers(stats)
        usage.add_metric([node], used_slots(stats) / max(1, stats.slots))
        leases.add_metric([node], stats.leases)
        spills.add_metric([node], stats.spills_waiting)
        writing.add_metric([node], stats.writing)
        for state in STATES:
            if state in values:
                slots.add_metric([node, state], values[state])
    yield from (usage, slots, leases, spills, writing)


def _lookups(pools: Pools) -> Iterator[Metric]:
    hits = CounterMetricFamily("kvasir_pool_tier_hits", "Blocks looked up that the tier had", labels=["node", "tier"])
    missed = CounterMetricFamily("kvasir_pool_misses", "Blocks looked up that no tier had", labels=["node"])
    evicted = CounterMetricFamily("kvasir_pool_evicted_blocks", "Blocks that are gone", labels=["node", "tier", "reason"])
    for node, stats in pools:
        values = _numbers(stats)
        hits.add_metric([node, Tier.DRAM.value], stats.hits)
        if stats.ssd_slots:
            hits.add_metric([node, Tier.SSD.value], stats.ssd_hits)
        missed.add_metric([node], misses(stats))
        apart = stats.quota_evictions + stats.demotions
        evicted.add_metric([node, Tier.DRAM.value, "space"], stats.evictions - apart)
        for tier, reason, name in _EVICTIONS:
            evicted.add_metric([node, tier.value, reason], values[name])
    yield from (hits, missed, evicted)


def _counters(pools: Pools) -> Iterator[Metric]:
    """Whatever else a pool counts, under the name that it has there."""
    names = [name for name in _numbers(PoolStats()) if name not in _OTHER_GAUGES and name not in STATES]
    families = [CounterMetricFamily(f"kvasir_pool_{name}", f"Pool {name.replace('_', ' ')}", labels=["node"]) for name in names]
    for node, stats in pools:
        values = _numbers(stats)
        for name, family in zip(names, families, strict=True):
            family.add_metric([node], values[name])
    yield from families


def _numbers(stats: PoolStats) -> dict[str, int]:
    return {name: value for name, value in asdict(stats).items() if isinstance(value, int)}
