"""One simulation: a cluster with its brains, a trace played to it, faults, and what is recorded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import numpy as np

from kvasir.core.commands import Decision
from kvasir.core.errors import ConfigError, InvariantError
from kvasir.core.events import InstanceInfo, InstanceJoined
from kvasir.core.pool_events import OwnerJoined
from kvasir.core.request import Request, Slo
from kvasir.costs.quick import quick
from kvasir.report.slo import ScaledSlo
from kvasir.scheduling.strategy import Strategy
from kvasir.simulator import brains
from kvasir.simulator.agenda import Agenda
from kvasir.simulator.breakage import Breakage
from kvasir.simulator.config import SimConfig
from kvasir.simulator.cores import Cores
from kvasir.simulator.faults import Fault, check_faults
from kvasir.simulator.hot import HotBlocks
from kvasir.simulator.hub import SimHub
from kvasir.simulator.instance import SimInstance
from kvasir.simulator.jobs import Job
from kvasir.simulator.memory import DeviceMemory, Memory, SharedMemory
from kvasir.simulator.network import Network
from kvasir.simulator.node import SimNode
from kvasir.simulator.noise import Noise
from kvasir.simulator.prompts import PromptKeys
from kvasir.simulator.record_book import RecordBook
from kvasir.simulator.recorder import RoleClock, Sampler
from kvasir.simulator.run import Run
from kvasir.simulator.spec import ClusterSpec, InstanceSpec, MemoryKind
from kvasir.workload.trace import Trace

TICK_S = 1.0
SPAN_S = 8.0
"""Spans of the agenda, by the number of instances: a few dozen things happen in each."""
NUM_REPORTS = 100
"""How often `on_progress` hears of a run, at most; never more than once a second of it."""


class Simulation:
    """Built, run once, then asked for its Run. Everything random comes from `seed`."""

    def __init__(
        self,
        trace: Trace,
        cluster: ClusterSpec,
        strategy: Strategy,
        *,
        slo: Slo | ScaledSlo,
        seed: int = 0,
        faults: Sequence[Fault] = (),
        config: SimConfig | None = None,
        on_progress: Callable[[int], None] | None = None,
    ):
        check_cluster(cluster)
        check_faults(faults, cluster)
        self._trace = trace
        self._cluster = cluster
        self._costs = quick(cluster.costs)
        self._strategy = strategy
        self._slo = slo
        self._seed = seed
        self._config = config = config if config is not None else SimConfig()
        self._on_progress = on_progress
        self._agenda = Agenda(SPAN_S / len(cluster.instances))
        self._network = Network(self._agenda)
        self._records = RecordBook(trace, self._agenda.stop)
        self._hot = HotBlocks(config.num_hot if config.sample_s else 0)
        self._decisions: list[Decision] | None = [] if config.keep_decisions else None
        self._keys = PromptKeys(trace.block_tokens, cluster.block_tokens)
        self._max_tokens: int = config.max_tokens
        self._position = 0
        self._seen = 0  # outcomes as of the last tick
        self._reported = 0
        self._alive_s = 0.0
        self._roles = RoleClock()
        self._old_prefill_s = 0.0
        self.hub = self._make_hub()
        self.conductor = brains.conductor(strategy, cluster, config, slo, Random(seed))
        self.hub.attach(self.conductor)
        for node in sorted(cluster.nodes, key=lambda n: n.id):
            make_pool = partial(brains.pool, strategy, cluster, node)
            block_bytes = cluster.block_tokens * cluster.kv_bytes_per_token
            self.hub.nodes[node.id] = SimNode(
                node, make_pool, block_bytes=block_bytes, agenda=self._agenda, network=self._network, listener=self.hub
            )
        self._noise = Noise(cluster.step_noise, seed) if cluster.step_noise else None
        self._cores: dict[str, Cores] = {}
        if cluster.low_share is not None and cluster.low_share < 1.0:
            shares = cluster.low_share, cluster.normal_share
            self._cores = {node.id: Cores(self._agenda, *shares) for node in cluster.nodes}
        infos = [_info(instance) for instance in sorted(cluster.instances, key=lambda i: i.id)]
        for info in infos:
            self._start(info)
        ids = tuple([info.id for info in infos])
        self._sampler = Sampler(self.conductor, self.hub.instances, self.hub.nodes, self._hot, ids)
        breakage = Breakage(self.hub, self._network, self._agenda, start=self._start, gone=self._gone)
        for fault in sorted(faults, key=lambda f: f.at_s):
            self._agenda.at(fault.at_s, breakage.strike, fault)

    def run(self) -> Run:
        """Play the trace to its last outcome."""
        agenda = self._agenda
        if self._trace.requests:
            agenda.at(self._trace.requests[0].arrival_s, self._arrive)
            agenda.at(agenda.now, self._tick)
            agenda.at(agenda.now, self._beat)
            if self._config.sample_s:
                agenda.at(agenda.now, self._sample)
            try:
                agenda.run()
            finally:
                agenda.forget()
        return self._result()

    def check(self) -> None:
        """Raises InvariantError unless all brains' invariants hold, nobody holds anything, and all KV flows have ended."""
        self.conductor.check()
        if self.conductor.num_requests or self.hub.jobs:
            raise InvariantError(f"requests are left: {list(self.hub.jobs)[:5]}")
        for instance in self.hub.instances.values():
            if not instance.is_up:
                continue
            instance.batcher.check()
            if instance.sequences:
                raise InvariantError(f"{instance.info.id} still has sequences {list(instance.sequences)[:5]}")
            instance.memory.check(instance.batcher.load().free_kv_tokens // self._cluster.block_tokens)
        for node in self.hub.nodes.values():
            if node.is_up:
                node.pool.check()
                stats = node.pool.stats()
                if stats.leases or stats.private or stats.leased:
                    raise InvariantError(f"{node.spec.id}: idle, but {stats}")

    # --- the cluster -------------------------------------------------------------------------------------------

    def _make_hub(self) -> SimHub:
        cluster, config = self._cluster, self._config
        return SimHub(
            agenda=self._agenda,
            network=self._network,
            costs=self._costs,
            block_tokens=cluster.block_tokens,
            token_bytes=cluster.kv_bytes_per_token,
            num_layers=cluster.num_layers,
            layerwise=config.layerwise,
            early=cluster.memory is MemoryKind.DEVICE,
            hand_off_s=cluster.hand_off_s,
            records=self._records,
            hot=self._hot,
            decisions=self._decisions,
            on_role=lambda instance: self._roles.enter(instance, self._agenda.now),
        )

    def _start(self, info: InstanceInfo) -> None:
        cluster = self._cluster
        node = self.hub.nodes[info.node]
        node.handle(OwnerJoined(info.id, info.epoch))
        memory: Memory
        if cluster.memory is MemoryKind.SHARED:
            memory = SharedMemory(node, info.id, info.epoch, cluster.block_tokens)
        else:
            memory = DeviceMemory(node, info.id, info.epoch, cluster.block_tokens, info.kv_tokens)
        instance = SimInstance(
            info,
            node,
            brains.batcher(self._strategy, cluster, self._config, info, self._slo),
            memory,
            agenda=self._agenda,
            costs=self._costs,
            listener=self.hub,
            block_tokens=cluster.block_tokens,
            max_gap_s=self._slo.tbt_s / 2,
            cores=self._cores.get(info.node),
            noise=self._noise,
        )
        self.hub.instances[info.id] = instance
        self._roles.enter(instance, self._agenda.now)
        self.hub.tell(InstanceJoined(info))

    def _gone(self, name: str) -> None:
        instance = self.hub.instances[name]
        self._roles.leave(instance, self._agenda.now)
        self._old_prefill_s += instance.prefill_s

    # --- time passes -------------------------------------------------------------------------------------------

    def _arrive(self, _: object) -> None:
        """All requests of this moment, then plan the next."""
        requests, now = self._trace.requests, self._agenda.now
        position = self._position
        while position < len(requests) and requests[position].arrival_s <= now:
            request = requests[position]
            job = Job(
                position,
                f"r{position}",
                arrival_s=request.arrival_s,
                prompt_tokens=request.input_tokens,
                output_tokens=request.output_tokens,
                keys=self._keys.of(request),
            )
            position += 1
            self._position = position
            self.hub.arrive(
                job,
                Request(
                    id=job.id,
                    num_prompt_tokens=job.prompt_tokens,
                    max_tokens=max(job.output_tokens, self._max_tokens),
                    keys=job.keys,
                    arrival_s=job.arrival_s,
                ),
            )
        if position < len(requests):
            self._agenda.at(requests[position].arrival_s, self._arrive)

    def _tick(self, _: object) -> None:
        self.hub.tick()
        self._watch()
        self._agenda.at(self._next(TICK_S), self._tick)

    def _watch(self) -> None:
        """Tell of progress, and give up when there is none."""
        ended, now = self._records.num_ended, self._agenda.now
        if ended > self._seen or self._position < len(self._trace.requests) or self.hub.is_working:
            self._alive_s = now
        elif now - self._alive_s > self._config.stall_s:
            raise InvariantError(
                f"simulation: nothing has happened since {self._alive_s:.0f} s; waiting: {list(self.hub.jobs)[:5]}"
            )
        self._seen = ended
        if self._on_progress is not None and (ended - self._reported) * NUM_REPORTS >= len(self._trace.requests):
            self._on_progress(ended)
            self._reported = ended

    def _beat(self, _: object) -> None:
        self.hub.beat(self._cluster.report_delay_s)
        self._agenda.at(self._next(self._cluster.heartbeat_s), self._beat)

    def _next(self, period_s: float) -> float:
        """When something periodic happens next: of the times at which nobody is there to notice, only the first and last."""
        at_s, requests = self._agenda.now + period_s, self._trace.requests
        if self.hub.jobs or self._position >= len(requests):
            return at_s
        idle_s = requests[self._position].arrival_s - at_s
        return at_s + period_s * max(0, math.floor(idle_s / period_s))

    def _sample(self, _: object) -> None:
        now = self._agenda.now
        self._sampler.take(now, arrived=self._position, rejected=sum(self.hub.rejections.values()))
        self._agenda.at(now + self._config.sample_s, self._sample)

    # --- the result --------------------------------------------------------------------------------------------

    def _result(self) -> Run:
        hub, now, costs = self.hub, self._agenda.now, self._costs
        for instance in hub.instances.values():
            self._roles.leave(instance, now)
        requests = self._trace.requests
        unloaded_s = np.array([costs.prefill_s(request.input_tokens, 0) for request in requests])
        counters: Counter[str] = Counter(self.conductor.counters)
        counters.update(hub.counters)
        counters["flows"] = self._network.num_flows
        counters["flow_bytes"] = int(self._network.num_bytes)
        return Run(
            policy=self._strategy.name,
            cluster=self._cluster.name,
            slo=self._slo,
            seed=self._seed,
            records=self._records.finish(unloaded_s),
            samples=tuple(self._sampler.samples),
            instances=tuple(sorted(instance.id for instance in self._cluster.instances)),
            nodes=tuple(hub.nodes),
            counters=dict(sorted(counters.items())),
            utilisation=self._roles.utilisation(),
            asked_blocks=hub.asked_blocks,
            found_blocks=hub.found_blocks,
            prefill_s=self._old_prefill_s + sum([instance.prefill_s for instance in hub.instances.values()]),
            num_prefills=hub.num_prefilled,
            duration_s=now - requests[0].arrival_s if requests else 0.0,
            decisions=tuple(self._decisions) if self._decisions is not None else None,
        )


def _info(spec: InstanceSpec) -> InstanceInfo:
    return InstanceInfo(id=spec.id, role=spec.role, node=spec.node, epoch=1, kv_tokens=spec.kv_tokens, max_batch=spec.max_batch)


def check_cluster(cluster: ClusterSpec) -> None:
    """Raises ConfigError for a cluster that cannot be."""
    nodes = {node.id: node for node in cluster.nodes}
    if len(nodes) != len(cluster.nodes) or len({i.id for i in cluster.instances}) != len(cluster.instances):
        raise ConfigError(f"cluster {cluster.name}: expected every node and every instance to have an id of its own")
    for instance in cluster.instances:
        if instance.node not in nodes:
            raise ConfigError(f"instance {instance.id}: got node {instance.node!r}, expected one of {', '.join(sorted(nodes))}")
        if instance.kv_tokens < 2 * cluster.block_tokens:
            raise ConfigError(f"instance {instance.id}: kv_tokens: got {instance.kv_tokens}, expected at least two blocks")
    if not 0 <= cluster.hand_off_s < math.inf:
        raise ConfigError(f"cluster {cluster.name}: hand_off_s: got {cluster.hand_off_s}, expected 0 or more")
    if cluster.max_stages is not None and cluster.max_stages < 1:
        raise ConfigError(f"cluster {cluster.name}: max_stages: got {cluster.max_stages}, expected at least 1")
    if not all(0 < factor < math.inf for factor in cluster.step_noise):
        raise ConfigError(f"cluster {cluster.name}: step_noise: got {cluster.step_noise}, expected numbers above 0")
    for node in cluster.nodes:
        if node.network_bandwidth <= 0:
            raise ConfigError(f"node {node.id}: network_bandwidth: got {node.network_bandwidth}, expected more than 0")
