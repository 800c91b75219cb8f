"""Metric families: one set of numbers, told under our own names and under vLLM's.

What scrapes vLLM (llm-d, AIBrix, production-stack, its Grafana boards) then works unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from kvasir.core.events import InstanceInfo, InstanceLoad
from kvasir.core.pool_events import PoolStats
from kvasir.core.usage import TenantUsage, TransportUsage
from kvasir.telemetry.histogram import Histogram
from kvasir.telemetry.pool_families import pool_families, tenant_families, transfer_families, used_slots


class InstanceView(Protocol):
    """What a scrape needs of an instance."""

    @property
    def info(self) -> InstanceInfo: ...
    @property
    def load(self) -> InstanceLoad: ...


class StatusView(Protocol):
    """What a scrape needs of a cluster."""

    @property
    def instances(self) -> Sequence[InstanceView]: ...
    @property
    def pools(self) -> Mapping[str, PoolStats]: ...
    @property
    def counters(self) -> Mapping[str, float]: ...
    @property
    def transports(self) -> Mapping[str, Sequence[TransportUsage]]: ...
    @property
    def tenants(self) -> Mapping[str, Sequence[TenantUsage]]: ...


class Counts(Protocol):
    """What a scrape needs of the gateway's own counts."""

    ttft_s: Histogram
    itl_s: Histogram
    tpot_s: Histogram
    e2e_s: Histogram
    successes: Counter[str]
    rejections: Counter[str]
    effective: int
    prompt_tokens: int
    generation_tokens: int
    prefix_query_tokens: int
    prefix_hit_tokens: int


class Families(Collector):
    """Makes the families anew at each scrape."""

    def __init__(
        self, counts: Counts, *, model: str, block_tokens: int, status: Callable[[], StatusView], block_bytes: int = 0
    ):
        self._counts = counts
        self._model = model
        self._block_tokens = block_tokens
        self._block_bytes = block_bytes
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        for prefix in ("kvasir_", "vllm:"):
            yield from self._latencies(prefix)
            yield from self._tokens(prefix)
        yield self._labelled("kvasir_request_success", "Requests answered in full", "finish_reason", self._counts.successes)
        yield self._labelled("vllm:request_success", "Requests answered in full", "finished_reason", self._counts.successes)
        yield self._labelled("kvasir_requests_rejected", "Requests rejected by admission", "code", self._counts.rejections)
        yield from _instances(status.instances)
        yield self._counter(
            "kvasir_effective_requests", "Requests that met both their TTFT and their TBT", self._counts.effective
        )
        yield from pool_families(status.pools, self._block_bytes)
        yield from transfer_families(status.transports)
        yield from tenant_families(status.tenants)
        for name, value in sorted(status.counters.items()):
            yield CounterMetricFamily(f"kvasir_cluster_{name}", f"Conductor's count of {name.replace('_', ' ')}", value)
        yield from self._vllm_gauges(status)

    def _latencies(self, prefix: str) -> Iterator[Metric]:
        counts = self._counts
        yield self._histogram(f"{prefix}time_to_first_token_seconds", "Arrival to first token", counts.ttft_s)
        yield self._histogram(f"{prefix}inter_token_latency_seconds", "Time between tokens", counts.itl_s)
        yield self._histogram(
            f"{prefix}time_per_output_token_seconds", "Mean time per token after a request's first", counts.tpot_s
        )
        yield self._histogram(f"{prefix}e2e_request_latency_seconds", "Arrival to last token", counts.e2e_s)

    def _tokens(self, prefix: str) -> Iterator[Metric]:
        counts = self._counts
        yield self._counter(
            f"{prefix}prompt_tokens", "Prompt tokens of requests that got their first token", counts.prompt_tokens
        )
        yield self._counter(f"{prefix}generation_tokens", "Tokens generated", counts.generation_tokens)
        yield self._counter(
            f"{prefix}prefix_cache_queries", "Prompt tokens looked up in the KVCache pool", counts.prefix_query_tokens
        )
        yield self._counter(f"{prefix}prefix_cache_hits", "Prompt tokens whose KV came from the pool", counts.prefix_hit_tokens)

    def _vllm_gauges(self, status: StatusView) -> Iterator[Metric]:
        """Sums over the cluster: to a router in front, a whole Kvasir is one server."""
        loads = [instance.load for instance in status.instances]
        pools = list(status.pools.values())
        usage = sum(used_slots(pool) for pool in pools) / max(1, sum(pool.slots for pool in pools))
        yield self._gauge("vllm:num_requests_running", "Requests running", sum(load.running for load in loads))
        yield self._gauge("vllm:num_requests_waiting", "Requests waiting", sum(load.waiting for load in loads))
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KVCache slots in use", usage)
        yield self._gauge("vllm:gpu_cache_usage_perc", "Older name of vllm:kv_cache_usage_perc", usage)
        config = InfoMetricFamily("vllm:cache_config", "Size of the KVCache", labels=["model_name"])
        sizes = {"block_size": str(self._block_tokens), "num_gpu_blocks": str(sum(pool.slots for pool in pools))}
        config.add_metric([self._model], sizes)
        yield config

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], histogram.buckets(), histogram.sum)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _labelled(self, name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name", label])
        for key, value in sorted(values.items()):
            family.add_metric([self._model, key], value)
        return family


def _instances(instances: Sequence[InstanceView]) -> Iterator[Metric]:
    labels = ["instance", "role", "node"]
    running = GaugeMetricFamily("kvasir_num_requests_running", "Requests running on the instance", labels=labels)
    waiting = GaugeMetricFamily("kvasir_num_requests_waiting", "Requests waiting on the instance", labels=labels)
    context = GaugeMetricFamily("kvasir_context_tokens", "Tokens of KV that running requests attend to", labels=labels)
    scale = GaugeMetricFamily(
        "kvasir_cost_scale", "Measured over predicted seconds of the instance's steps", labels=[*labels, "phase"]
    )
    for instance in instances:
        values = [instance.info.id, instance.info.role.value, instance.info.node]
        running.add_metric(values, instance.load.running)
        waiting.add_metric(values, instance.load.waiting)
        context.add_metric(values, instance.load.context_tokens)
        for phase, measured in (("prefill", instance.load.prefill_scale), ("decode", instance.load.decode_scale)):
            if measured is not None:
                scale.add_metric([*values, phase], measured)
    yield from (running, waiting, context, scale)
