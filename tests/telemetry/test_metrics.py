"""What Prometheus and those who read vLLM's names get to see."""

from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from kvasir.core.events import InstanceInfo, InstanceLoad
from kvasir.core.pool_events import PoolStats
from kvasir.core.request import Role, Slo
from kvasir.core.usage import TenantUsage, TransportUsage
from kvasir.report.timeline import RequestRecord
from kvasir.telemetry.histogram import Histogram
from kvasir.telemetry.metrics import Metrics


@dataclass
class Instance:
    info: InstanceInfo
    load: InstanceLoad


@dataclass
class Status:
    instances: list[Instance] = field(default_factory=list)
    pools: dict[str, PoolStats] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    transports: dict[str, tuple[TransportUsage, ...]] = field(default_factory=dict)
    tenants: dict[str, tuple[TenantUsage, ...]] = field(default_factory=dict)


def metrics_of(status: Status) -> Metrics:
    slo = Slo(ttft_s=0.5, tbt_s=0.05)
    return Metrics(model='a "model"\\', block_tokens=16, status=lambda: status, block_bytes=1000, slo=slo)


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = frozenset((k, v) for k, v in sample.labels.items() if k != "model_name")
            assert (sample.name, labels) not in found, f"{sample.name} twice"
            found[sample.name, labels] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


def test_our_names_and_vllms_tell_the_same_numbers() -> None:
    metrics = metrics_of(Status())
    metrics.first_token_came(1, ttft_s=0.3, prompt_tokens=100)
    metrics.tokens_came(2, gap_s=0.04)
    metrics.prefix_looked_up(tokens=100, hit_tokens=64)
    record = RequestRecord("r", arrival_s=0.0, input_tokens=100, output_tokens=3, token_times_s=(0.3, 0.34, 0.34))
    metrics.finished(record, "stop")
    for prefix in ("kvasir_", "vllm:"):
        assert value(metrics, f"{prefix}time_to_first_token_seconds_count") == 1
        assert value(metrics, f"{prefix}time_to_first_token_seconds_bucket", le="0.25") == 0
        assert value(metrics, f"{prefix}time_to_first_token_seconds_bucket", le="0.5") == 1
        assert value(metrics, f"{prefix}inter_token_latency_seconds_count") == 2
        assert abs(value(metrics, f"{prefix}inter_token_latency_seconds_sum") - 0.04) < 1e-9
        assert abs(value(metrics, f"{prefix}e2e_request_latency_seconds_sum") - 0.34) < 1e-9
        assert value(metrics, f"{prefix}prompt_tokens_total") == 100
        assert value(metrics, f"{prefix}generation_tokens_total") == 3
        assert value(metrics, f"{prefix}prefix_cache_queries_total") == 100
        assert value(metrics, f"{prefix}prefix_cache_hits_total") == 64
    assert value(metrics, "kvasir_request_success_total", finish_reason="stop") == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 1


def test_instances_have_their_own_gauges_and_a_sum_for_vllm() -> None:
    loads = [InstanceLoad(waiting=2, running=1), InstanceLoad(running=5, context_tokens=900, decode_scale=1.5)]
    infos = [InstanceInfo(f"i{k}", role, "n0", 1, 4096, 8) for k, role in enumerate((Role.PREFILL, Role.DECODE))]
    metrics = metrics_of(Status(instances=[Instance(i, load) for i, load in zip(infos, loads, strict=True)]))
    assert value(metrics, "kvasir_num_requests_waiting", instance="i0", role="prefill", node="n0") == 2
    assert value(metrics, "kvasir_num_requests_running", instance="i1", role="decode", node="n0") == 5
    assert value(metrics, "kvasir_cost_scale", instance="i1", role="decode", node="n0", phase="decode") == 1.5
    assert 'kvasir_cost_scale{instance="i0"' not in metrics.exposition().decode()
    assert value(metrics, "vllm:num_requests_running") == 6
    assert value(metrics, "vllm:num_requests_waiting") == 2


def test_cached_blocks_that_can_be_evicted_do_not_count_as_used() -> None:
    stats = PoolStats(slots=100, free=10, reserved=5, private=5, published=80, leased=10, lookups=7, hits=3)
    metrics = metrics_of(Status(pools={"n0": stats}, counters={"dispatches": 4}))
    assert value(metrics, "kvasir_kv_cache_usage_perc", node="n0") == 0.2
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.2
    assert value(metrics, "kvasir_pool_slots", node="n0", state="published") == 80
    assert value(metrics, "kvasir_pool_hits_total", node="n0") == 3
    assert value(metrics, "kvasir_cluster_dispatches_total") == 4
    assert value(metrics, "vllm:cache_config_info", block_size="16", num_gpu_blocks="100") == 1


def test_rejections_are_counted_by_code() -> None:
    metrics = metrics_of(Status())
    for code in ("slo_ttft", "slo_tbt", "slo_tbt"):
        metrics.rejected(code)
    assert value(metrics, "kvasir_requests_rejected_total", code="slo_tbt") == 2


def test_two_gateways_in_one_process_do_not_share_a_registry() -> None:
    first, second = metrics_of(Status()), metrics_of(Status())
    first.rejected("x")
    assert "kvasir_requests_rejected_total{" not in second.exposition().decode()


def test_a_value_on_an_edge_is_within_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for observed in (1.0, 1.5, 2.0, 3.0):
        histogram.observe(observed)
    assert histogram.buckets() == [("1.0", 1), ("2.0", 3), ("+Inf", 4)]
    assert histogram.sum == 7.5


def test_tiers_have_their_blocks_bytes_hits_and_evictions() -> None:
    stats = PoolStats(
        slots=100, published=60, lookups=50, hits=20, ssd_hits=10, ssd_slots=400, ssd_published=300, evictions=10,
        quota_evictions=2, demotions=1, dropped=2,
        ssd_evictions=3, failed_loads=1, spilled=9, spills_waiting=4,
    )  # fmt: skip
    metrics = metrics_of(Status(pools={"n0": stats}))
    assert value(metrics, "kvasir_pool_blocks", node="n0", tier="ssd") == 300
    assert value(metrics, "kvasir_pool_bytes", node="n0", tier="dram") == 60_000
    assert value(metrics, "kvasir_pool_capacity_bytes", node="n0", tier="ssd") == 400_000
    assert value(metrics, "kvasir_pool_tier_hits_total", node="n0", tier="ssd") == 10
    assert value(metrics, "kvasir_pool_misses_total", node="n0") == 20
    for tier, reason, count in (
        ("dram", "space", 7),
        ("dram", "quota", 2),
        ("dram", "demoted", 1),
        ("dram", "unwritten", 2),
        ("ssd", "space", 3),
        ("ssd", "failed_read", 1),
    ):
        assert value(metrics, "kvasir_pool_evicted_blocks_total", node="n0", tier=tier, reason=reason) == count
    assert value(metrics, "kvasir_pool_spilled_total", node="n0") == 9
    assert value(metrics, "kvasir_pool_spill_queue_length", node="n0") == 4


def test_a_node_without_an_ssd_tells_of_none() -> None:
    metrics = metrics_of(Status(pools={"n0": PoolStats(slots=100)}))
    assert ("kvasir_pool_blocks", frozenset({("node", "n0"), ("tier", "ssd")})) not in samples(metrics)


def test_every_count_of_a_pool_is_told_once() -> None:
    exposed = {name for name, _ in samples(metrics_of(Status(pools={"n0": PoolStats(slots=1, ssd_slots=1)})))}
    gauges = {"slots", "free", "reserved", "private", "published", "leased", "leases", "owners", "ssd_slots", "ssd_free"}
    gauges |= {"ssd_published", "writing", "spilling", "spills_waiting", "loading", "fetching", "pinned", "tenants"}
    counters = set(PoolStats.__struct_fields__) - gauges
    assert {f"kvasir_pool_{name}_total" for name in counters} <= exposed


def test_transports_and_tenants_have_their_own() -> None:
    transports = (
        TransportUsage("tcp", bytes=10, transfers=4, failures=1, retries=2, seconds=0.5, queued=3),
        TransportUsage("shm"),
    )
    tenants = (TenantUsage("a", 5, 10), TenantUsage("b", 6))
    metrics = metrics_of(Status(transports={"n0": transports}, tenants={"n0": tenants}))
    for name, count in (("bytes", 10), ("transfers", 4), ("failures", 1), ("retries", 2), ("seconds", 0.5)):
        assert value(metrics, f"kvasir_transfer_{name}_total", node="n0", transport="tcp") == count
    assert value(metrics, "kvasir_transfer_queue_length", node="n0", transport="tcp") == 3
    assert value(metrics, "kvasir_transfer_bytes_total", node="n0", transport="shm") == 0
    assert value(metrics, "kvasir_tenant_blocks", node="n0", tenant="b") == 6
    assert value(metrics, "kvasir_tenant_quota_blocks", node="n0", tenant="a") == 10
    assert ("kvasir_tenant_quota_blocks", frozenset({("node", "n0"), ("tenant", "b")})) not in samples(metrics)


def test_effective_requests_are_those_that_met_both_objectives() -> None:
    metrics = metrics_of(Status())
    for times in ((0.3, 0.34), (0.6, 0.64), (0.3, 0.4)):
        metrics.finished(RequestRecord("r", 0.0, 10, output_tokens=2, token_times_s=times), "stop")
    assert value(metrics, "kvasir_effective_requests_total") == 1
