"""The cluster's state as one JSON object: what `/admin/status` answers and `kvasir top` shows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from msgspec.structs import asdict

from kvasir.cluster.service import Admin, ClusterStatus, InstanceStatus, PinStatus, TimedDecision
from kvasir.core.pool_events import PoolStats
from kvasir.core.tier import Tier
from kvasir.gateway.desk import Desk
from kvasir.telemetry.metrics import Metrics
from kvasir.telemetry.pool_families import misses, tier_blocks, used_slots

NUM_DECISIONS = 8

Json = dict[str, object]


def overview(desk: Desk, admin: Admin) -> Json:
    """Counts are since the start; rates follow from two of these and their `time_s`."""
    status = desk.service.status()
    return {
        "version": version("kvasir-serve"),
        "model": desk.model,
        "time_s": time.monotonic(),
        "uptime_s": time.time() - desk.started,
        "ready": status.ready,
        "reason": status.reason,
        "nodes": [_node(name, status, desk.service.spec.slot_bytes) for name in sorted(status.pools)],
        "instances": [_instance(instance) for instance in status.instances],
        **_requests(desk.metrics),
        "decisions": [decision_json(timed) for timed in admin.decisions(NUM_DECISIONS)],
        "pins": [pin_json(pin) for pin in admin.pins()],
        "counters": status.counters,
    }


def decision_json(timed: TimedDecision) -> Json:
    decision = timed.decision
    return {
        "request_id": decision.request_id,
        "age_s": round(timed.age_s, 3),
        "policy": decision.policy,
        "prefill": decision.chosen,
        "decode": decision.decode,
        "ttft_s": decision.ttft_s,
        "tbt_s": decision.tbt_s,
        "refusal": decision.refusal,
        "reason": decision.reason,
    }


def pin_json(pin: PinStatus) -> Json:
    return {
        "id": pin.id,
        "tokens": pin.num_tokens,
        "blocks": pin.num_blocks,
        "ttl_s": round(pin.ttl_s, 3),
        "priority": pin.priority,
        "tenant": pin.tenant,
        "held_blocks": pin.held,
    }


def _node(name: str, status: ClusterStatus, block_bytes: int) -> Json:
    stats = status.pools[name]
    return {
        "node": name,
        "instances": sum(instance.info.node == name for instance in status.instances),
        "used_share": used_slots(stats) / max(1, stats.slots),
        "leases": stats.leases,
        "pinned": stats.pinned,
        "lookups": stats.lookups,
        "misses": misses(stats),
        "tiers": [_tier(tier, stats, block_bytes) for tier in tier_blocks(stats)],
        "transports": [asdict(transport) for transport in status.transports.get(name, ())],
        "tenants": [asdict(usage) for usage in status.tenants.get(name, ())],
    }


def _tier(tier: Tier, stats: PoolStats, block_bytes: int) -> Json:
    blocks, slots = tier_blocks(stats)[tier]
    is_dram = tier is Tier.DRAM
    return {
        "tier": tier.value,
        "blocks": blocks,
        "slots": slots,
        "bytes": blocks * block_bytes,
        "capacity_bytes": slots * block_bytes,
        "hits": stats.hits if is_dram else stats.ssd_hits,
        "evictions": stats.evictions if is_dram else stats.ssd_evictions,
    }


def _instance(instance: InstanceStatus) -> Json:
    info = instance.info
    return {
        "id": info.id,
        "role": info.role.value,
        "node": info.node,
        "epoch": info.epoch,
        **asdict(instance.load),
        "heartbeat_age_s": round(instance.heartbeat_age_s, 3),
        "prompt_tokens": instance.prompt_tokens,
        "output_tokens": instance.output_tokens,
    }


def _requests(metrics: Metrics) -> Json:
    answered, rejected = sum(metrics.successes.values()), sum(metrics.rejections.values())
    offered = answered + rejected
    return {
        "requests": {
            "answered": answered,
            "rejected": dict(metrics.rejections),
            "prompt_tokens": metrics.prompt_tokens,
            "cached_tokens": metrics.prefix_hit_tokens,
            "generation_tokens": metrics.generation_tokens,
        },
        "slo": {
            **asdict(metrics.slo),
            "effective": metrics.effective,
            "offered": offered,
            "attainment": metrics.effective / offered if offered else None,
        },
        "latency": {
            "of_last": len(metrics.recent_ttft_s),
            "ttft_s": _percentiles(metrics.recent_ttft_s),
            "tbt_s": _percentiles(metrics.recent_tbt_s),
        },
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return dict(zip(("p50", "p90", "p99"), map(float, np.percentile(values, (50, 90, 99))), strict=True))
