"""The body of the Conductor in virtual time: what cluster/hub.py does, with messages that take no time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final

from msgspec.structs import replace

from kvasir.core import commands as cmd
from kvasir.core.commands import Candidate, Command, Decision
from kvasir.core.events import (
    Event,
    Failed,
    Heartbeat,
    InstanceJoined,
    Tick,
)
from kvasir.core.keys import BlockKey
from kvasir.core.request import Request
from kvasir.core.tier import Tier
from kvasir.costs.quick import QuickCosts
from kvasir.report.timeline import Status
from kvasir.scheduling.conductor import Conductor
from kvasir.simulator.agenda import Agenda
from kvasir.simulator.gaps import tbt_s
from kvasir.simulator.hot import HotBlocks
from kvasir.simulator.instance import SimInstance
from kvasir.simulator.jobs import Attempt, Job, Seq
from kvasir.simulator.listener import Listener
from kvasir.simulator.network import Flow, Network, Pipes
from kvasir.simulator.node import MESSENGER, SimNode
from kvasir.simulator.record_book import RecordBook


class SimHub(Listener):
    """Carries the Conductor's commands out and hears nodes and instances."""

    def __init__(
        self,
        *,
        agenda: Agenda,
        network: Network,
        costs: QuickCosts,
        block_tokens: int,
        token_bytes: int,
        num_layers: int,
        layerwise: bool,
        early: bool,
        hand_off_s: float,
        records: RecordBook,
        hot: HotBlocks,
        decisions: list[Decision] | None,
        on_role: Callable[[SimInstance], None],
    ):
        """`early`: a prefill may start before its fetched prefix is complete, which takes memory apart from the pool's."""
        self.nodes: dict[str, SimNode] = {}
        self.instances: dict[str, SimInstance] = {}
        self.jobs: dict[str, Job] = {}
        self.counters: dict[str, int] = defaultdict(int)
        self.rejections: dict[str, int] = defaultdict(int)
        self.asked_blocks = 0
        self.found_blocks = 0
        self.num_prefilled = 0
        self._agenda = agenda
        self._network = network
        self._costs = costs
        self._block_tokens = block_tokens
        self._token_bytes = token_bytes
        self._num_layers = num_layers
        self._layerwise = layerwise
        self._early = early
        self._hand_off_s = hand_off_s
        self._records = records
        self._hot = hot
        self._decisions = decisions
        self._on_role = on_role
        self._num_runs = 0
        self._conductor: Conductor | None = None

    def attach(self, conductor: Conductor) -> None:
        self._conductor = conductor

    @property
    def _brain(self) -> Conductor:
        assert self._conductor is not None, "a hub is told nothing before it has a Conductor"
        return self._conductor

    def tell(self, event: Event) -> None:
        """Give the Conductor an event and carry out what it says."""
        self._carry_out(self._brain.handle(event, self._agenda.now))

    def blocks_stored(self, node: str, seq: int, keys: tuple[BlockKey, ...], tier: Tier) -> None:
        self._carry_out(self._brain.blocks_stored(node, seq, keys, tier, self._agenda.now))

    def blocks_removed(self, node: str, seq: int, keys: tuple[BlockKey, ...], tier: Tier) -> None:
        self._carry_out(self._brain.blocks_removed(node, seq, keys, tier, self._agenda.now))

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            _HANDLERS[type(command)](self, command)

    def arrive(self, job: Job, request: Request) -> None:
        self.jobs[job.id] = job
        self._carry_out(self._brain.arrived(request, self._agenda.now))

    def _start_prefill(self, command: cmd.Prefill) -> None:
        self._record(command.decision)
        self._prefill(command)

    def _reject(self, command: cmd.Reject) -> None:
        self._record(command.decision)
        self.rejections[command.code] += 1
        self._end(self.jobs[command.request_id], Status.REJECTED, command.code)

    def _fail(self, command: cmd.Fail) -> None:
        self._end(self.jobs[command.request_id], Status.FAILED, command.code)

    def _plan_role(self, command: cmd.SetRole) -> None:
        self._agenda.soon(self._set_role, command)

    def _resync(self, command: cmd.Resync) -> None:
        self.tell(self.nodes[command.node].inventory())

    def _share_cores(self, command: cmd.ShareCores) -> None:
        self.instances[command.instance].pace(command.with_prefill)

    # --- prefill -----------------------------------------------------------------------------------------------

    def _prefill(self, command: cmd.Prefill) -> None:
        job = self.jobs[command.request_id]
        if job.attempt is not None:
            self._abandon(job.attempt)
            job.attempt.forget()
        self._num_runs += 1
        candidate: Candidate = command.candidate
        prefill: str = command.instance
        decode: str = command.decode
        rank: float = command.rank
        attempt = job.attempt = Attempt(job, f"{job.id}#{self._num_runs}", decode)
        group: tuple[str, ...] = candidate.group or (prefill,)
        share = 1.0 / len(group)
        for place, instance in enumerate(group):
            name = attempt.name if place == len(group) - 1 else f"{attempt.name}/{place}"
            seq = Seq(attempt, self.instances[instance], name, rank=rank, share=share)
            if attempt.stages:
                attempt.stages[-1].stage = seq
            attempt.stages.append(seq)
            seq.instance.expect(seq)
        last = attempt.stages[-1]
        last.hands_off = decode != prefill
        own = last.instance.memory.open(last)
        if not (self._fetch(last, own, candidate) or self._load(last, own, candidate)):
            self._ready(attempt, own)

    def _ready(self, attempt: Attempt, blocks: int) -> None:
        """The first `blocks` of the prompt are in place: prefill the rest."""
        job, tokens = attempt.job, blocks * self._block_tokens
        if job.cached_tokens is None:
            job.cached_tokens = tokens
            self.asked_blocks += len(job.keys)
            self.found_blocks += blocks
            self._hot.hit(job.keys[:blocks])
        last = attempt.stages[-1]
        if len(attempt.stages) > 1 and not last.instance.memory.share(attempt.stages):
            self.failed(last, "its node has no room for a pipeline")
            return
        for seq in attempt.stages:
            seq.prefix_tokens = tokens
            if seq is not attempt.stages[0]:
                seq.available = max(tokens, seq.available or 0)
            seq.instance.submit(seq)

    def _fetch(self, seq: Seq, own: int, candidate: Candidate) -> bool:
        """Bring the rest of the planned prefix from its source; False if there is nothing to bring."""
        if candidate.source is None:
            return False
        source, lease = self.nodes[candidate.source], f"{seq.name}<"
        keys = seq.job.keys[: candidate.prefix_tokens // self._block_tokens]
        if not source.is_up or len(keys) <= own:
            return False
        found = source.lend(lease, keys)
        if found <= own:
            source.close(lease)
            return False
        self.counters["fetches"] += 1
        self.counters["fetched_blocks"] += found - own

        def arrived() -> int:
            source.close(lease)
            return seq.instance.memory.fetched(seq, keys[own:found])

        node = seq.instance.node
        pipes, latency_s = (source.outgoing, node.incoming), source.spec.network_latency_s
        self._bring(seq, own, found, pipes, latency_s, arrived, lambda: source.close(lease))
        return True

    def _load(self, seq: Seq, own: int, candidate: Candidate) -> bool:
        """Read the rest of the planned prefix from the node's SSD; False if there is nothing to read."""
        keys = seq.job.keys[own : candidate.prefix_tokens // self._block_tokens]
        memory = seq.instance.memory
        if not candidate.load_tokens or not keys:
            return False
        count = memory.start_load(seq, keys)
        if not count:
            return False
        self.counters["loads"] += 1
        self.counters["loaded_blocks"] += count
        keys = keys[:count]

        def stop() -> None:
            memory.end_load(seq, keys, is_wanted=False)

        pipes = (seq.instance.node.ssd_out,)
        self._bring(seq, own, own + count, pipes, 0.0, lambda: memory.end_load(seq, keys, is_wanted=True), stop)
        return True

    def _bring(
        self,
        seq: Seq,
        own: int,
        found: int,
        pipes: Pipes,
        latency_s: float,
        arrived: Callable[[], int],
        stop: Callable[[], None],
    ) -> None:
        """Blocks from `own` to `found` of a prefix are coming; `arrived` says how many of them are usable."""
        attempt = seq.attempt
        seq.deferred = []

        def done(flow: Flow) -> None:
            del attempt.flows[flow]
            usable = arrived()
            if seq.is_fetched:
                self._landed(attempt, None)  # a prefill that was faster than its fetch is complete only now
            else:
                seq.is_fetched = True
                self._ready(attempt, own + usable)

        def broken() -> None:
            attempt.flows.pop(flow, None)
            if seq.is_fetched:
                self.failed(seq, "a node was lost while a prefix came from it")
                return
            seq.is_fetched, seq.deferred = True, None
            self._ready(attempt, own)

        num_bytes = (found - own) * self._block_tokens * self._token_bytes
        flow = self._network.start(pipes, num_bytes, done, latency_s=latency_s)
        flow.fail = broken
        attempt.flows[flow] = stop
        if self._layerwise and self._early:
            self._start_early(seq, flow, found)

    def _start_early(self, seq: Seq, flow: Flow, found: int) -> None:
        """Start so that the flow ends when all layers but one are computed; look again then, for it may have become slower."""
        tokens = found * self._block_tokens
        hidden_s = self._costs.prefill_s(seq.num_tokens - tokens, tokens) * (1.0 - 1.0 / self._num_layers)

        def look(_: object) -> None:
            if seq.is_fetched or flow not in seq.attempt.flows:
                return
            start_s = self._network.ends_s(flow) - hidden_s
            if start_s > self._agenda.now + 1e-9:
                self._agenda.at(start_s, look)
                return
            seq.is_fetched = True
            self._ready(seq.attempt, found)

        look(None)

    def _flow(
        self,
        attempt: Attempt,
        source: SimNode,
        target: SimNode,
        tokens: float,
        then: Callable[[Flow], None],
        fail: Callable[[], None],
        stop: Callable[[], None] | None = None,
    ) -> Flow:
        """KV of `tokens` on its way for an attempt. `fail` when one end is lost, `stop` when nobody wants it any more."""

        def broken() -> None:
            attempt.flows.pop(flow, None)
            fail()

        flow = self._send(source, target, tokens, then)
        flow.fail = broken
        attempt.flows[flow] = stop
        return flow

    def _send(self, source: SimNode, target: SimNode, tokens: float, then: Callable[[Flow], None]) -> Flow:
        pipes = (source.outgoing, target.incoming)
        return self._network.start(pipes, tokens * self._token_bytes, then, latency_s=source.spec.network_latency_s)

    def prefill_started(self, seq: Seq) -> None:
        """A pipeline's stages send their layers' KV to the last; a hand-off streams, layer by layer."""
        attempt, node = seq.attempt, seq.instance.node
        if seq.stage is not None:
            target = attempt.stages[-1].instance.node
            if target is not node:
                tokens = (seq.num_tokens - seq.prefix_tokens) * seq.share
                self._flow(attempt, node, target, tokens, lambda flow: self._landed(attempt, flow), lambda: None)
        elif seq.hands_off and self._layerwise:
            decoder = self.instances[attempt.decode]
            if decoder.node is not node and decoder.node.is_up:
                self._stream(attempt, node, decoder.node, seq.num_tokens * (1.0 - 1.0 / self._num_layers))

    def _stream(self, attempt: Attempt, source: SimNode, target: SimNode, tokens: float) -> None:
        """The KV of a prompt on its way to where it will be decoded."""

        def landed(flow: Flow) -> None:
            self._landed(attempt, flow)

        attempt.stream_to = target
        attempt.stream = self._flow(attempt, source, target, tokens, landed, lambda: self._cut_stream(attempt))

    def _cut_stream(self, attempt: Attempt) -> None:
        attempt.stream = attempt.stream_to = None
        if attempt.decoder is not None:
            self.failed(attempt.decoder, "a node was lost during a hand-off")

    def stage_computed(self, seq: Seq, tokens: int) -> None:
        """Activations of the chunk go to the next stage; of their time only the latency is modelled."""
        following = seq.stage
        assert following is not None, "the last stage has nobody to tell"
        latency_s = seq.instance.node.spec.network_latency_s if following.instance.node is not seq.instance.node else 0.0
        self._agenda.at(self._agenda.now + latency_s, self._extend, (following, tokens))

    def _extend(self, extended: tuple[Seq, int]) -> None:
        seq, tokens = extended
        seq.instance.extend(seq, tokens)

    def first_token(self, seq: Seq) -> None:
        attempt = seq.attempt
        if attempt.job.attempt is attempt and not attempt.is_prefilled:
            self._prefilled(seq)

    def handed_off(self, seq: Seq) -> None:
        attempt = seq.attempt
        attempt.offered = seq.instance.node
        if attempt.job.attempt is not attempt:
            self._abandon(attempt)
            return
        self._prefilled(seq)
        if attempt.decoder is None:
            self._abandon(attempt)

    def _prefilled(self, seq: Seq) -> None:
        job = seq.job
        seq.attempt.is_prefilled = True
        self.num_prefilled += 1
        self._carry_out(self._brain.prefill_done(job.id, seq.instance.id, self._agenda.now))

    # --- decode ------------------------------------------------------------------------------------------------

    def _decode(self, command: cmd.Decode) -> None:
        job = self.jobs[command.request_id]
        attempt = job.attempt
        assert attempt is not None, "only what was placed is decoded"
        assert attempt.offered is not None, "only what was handed off is decoded elsewhere"
        instance, source = self.instances[command.instance], attempt.offered
        seq = attempt.decoder = Seq(attempt, instance, attempt.name)
        seq.is_adopted = True
        seq.prefix_tokens = seq.num_tokens - 1
        instance.expect(seq)
        if instance.node is source:
            self._landed(attempt, None)
            return
        if attempt.stream is not None and attempt.stream_to is instance.node:
            last_layer = seq.prefix_tokens / self._num_layers
            if attempt.stream.is_active:
                self._network.extend(attempt.stream, last_layer * self._token_bytes)
                return
            tokens = last_layer
        else:
            tokens = float(seq.prefix_tokens)
        self._stop_stream(attempt)
        self._stream(attempt, source, instance.node, tokens)

    def _stop_stream(self, attempt: Attempt) -> None:
        flow, attempt.stream = attempt.stream, None
        if flow is not None and flow in attempt.flows:
            del attempt.flows[flow]
            self._network.stop(flow)

    def _landed(self, attempt: Attempt, flow: Flow | None) -> None:
        """A flow has ended; when it was the last one and the request was handed off, it can decode."""
        if flow is not None:
            del attempt.flows[flow]
        seq = attempt.decoder
        if seq is None or attempt.flows:
            return
        source = attempt.offered
        if source is not None and source is not seq.instance.node:
            source.close(attempt.name)
            attempt.offered = None
        if self._hand_off_s:
            self._agenda.at(self._agenda.now + self._hand_off_s, seq.instance.submit, seq)
        else:
            seq.instance.submit(seq)

    # --- ends --------------------------------------------------------------------------------------------------

    def finished(self, seq: Seq) -> None:
        job = seq.job
        if job.attempt is not seq.attempt:
            return
        if not seq.attempt.is_prefilled:
            self.num_prefilled += 1
        self._end(job, _OK, None)
        self._carry_out(self._brain.finished(job.id, seq.instance.id, job.emitted, self._agenda.now))

    def failed(self, seq: Seq, error: str) -> None:
        self._agenda.soon(self._report_failure, (seq, error))

    def _report_failure(self, failure: tuple[Seq, str]) -> None:
        seq, error = failure
        if seq.job.attempt is seq.attempt and seq.job.id in self.jobs:
            self.counters["failures"] += 1
            self.tell(Failed(seq.job.id, seq.instance.id, error))

    def _cancel(self, command: cmd.Cancel) -> None:
        job = self.jobs.get(command.request_id)
        if job is not None and job.attempt is not None:
            self._abandon(job.attempt)

    def _abandon(self, attempt: Attempt) -> None:
        """Nobody works on it any more: stop its flows, take back its offer, cancel its sequences."""
        flows, attempt.flows = attempt.flows, {}
        for flow, stop in flows.items():
            self._network.stop(flow)
            if stop is not None:
                stop()
        attempt.stream = None
        if attempt.offered is not None:
            attempt.offered.close(attempt.name)
            attempt.offered = None
        for seq in attempt.sequences:
            seq.instance.cancel(seq)

    def _end(self, job: Job, status: Status, reason: str | None) -> None:
        del self.jobs[job.id]
        attempt, job.attempt = job.attempt, None
        if attempt is not None:
            self._abandon(attempt)
            attempt.forget()
        self._records.end(
            job.number,
            status,
            self._agenda.now,
            reason=reason,
            output_tokens=job.emitted,
            cached_tokens=job.cached_tokens or 0,
            ttft_s=job.first_token_s - job.arrival_s if job.emitted else None,
            tbt_s=tbt_s(job.gaps),
        )

    # --- replicas, roles, reports ------------------------------------------------------------------------------

    def _replicate(self, command: cmd.Replicate) -> None:
        source, target = self.nodes[command.source], self.nodes[command.target]
        if not (source.is_up and target.is_up) or source is target:
            return
        self._num_runs += 1
        lease = f"replica#{self._num_runs}"
        own = target.lend(lease, command.keys)
        found = source.lend(lease, command.keys)

        def close() -> None:
            source.close(lease)
            target.close(lease)

        if found <= own:
            close()
            return
        keys: tuple[BlockKey, ...] = command.keys[own:found]
        self.counters["replications"] += 1
        self.counters["replicated_blocks"] += len(keys)

        def arrived(flow: Flow) -> None:
            target.put(MESSENGER, 0, lease, keys)
            close()

        self._send(source, target, len(keys) * self._block_tokens, arrived).fail = close

    def _set_role(self, command: cmd.SetRole) -> None:
        instance = self.instances.get(command.instance)
        if instance is not None and instance.info.role is not command.role:
            instance.info = replace(instance.info, role=command.role)
            self._on_role(instance)
            self.tell(InstanceJoined(instance.info))

    def beat(self, report_delay_s: float) -> None:
        """Every instance that did anything says how it is, unless that changes nothing."""
        conductor = self._brain
        for instance in list(self.instances.values()):
            name, epoch = instance.id, instance.epoch
            is_idle = not instance.sequences
            if is_idle and instance.was_idle:
                continue
            instance.was_idle = is_idle
            if report_delay_s:
                report = Heartbeat(name, epoch, instance.load())
                self._agenda.at(self._agenda.now + report_delay_s, self.tell, report)
            elif conductor.wants_report(name, epoch):
                self._carry_out(conductor.heartbeat(name, epoch, instance.waiting_tokens, self._agenda.now))
            instance.tick()

    @property
    def is_working(self) -> bool:
        """Whether anybody computes or any KV is on its way."""
        return self._network.num_active > 0 or any(instance.is_computing for instance in self.instances.values())

    def tick(self) -> None:
        self.tell(Tick())

    def _record(self, decision: Decision) -> None:
        if self._decisions is not None:
            self._decisions.append(decision)


_OK: Final = Status.OK

_HANDLERS: Final[dict[type[Command], Callable[[SimHub, Any], None]]] = {
    cmd.Prefill: SimHub._start_prefill,
    cmd.Decode: SimHub._decode,
    cmd.Cancel: SimHub._cancel,
    cmd.Reject: SimHub._reject,
    cmd.Fail: SimHub._fail,
    cmd.SetRole: SimHub._plan_role,
    cmd.Replicate: SimHub._replicate,
    cmd.Resync: SimHub._resync,
    cmd.ShareCores: SimHub._share_cores,
}
"""All that the Conductor says."""
