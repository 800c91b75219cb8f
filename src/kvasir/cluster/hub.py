"""The live body of the Conductor: it takes requests from the gateway, tells instances what to run, and passes tokens on.

Everything here runs in one event loop and one process with the gateway. The brain decides by numbers; this body keeps the
prompts and the tokens so far, so that a request whose instance died is replayed elsewhere and its stream goes on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog
from msgspec.structs import replace

from kvasir.cluster.messages import (
    BlocksChanged,
    CancelRun,
    ExtendRun,
    HandedOff,
    HelloInstance,
    HelloPool,
    InstanceReport,
    Message,
    OrderDone,
    Pace,
    PeerPool,
    Phase,
    PipelineReady,
    PoolReport,
    PrefixPlan,
    RunFailed,
    RunRequest,
    StageComputed,
    StageLeft,
    StagePlan,
    StepOutput,
    TokenOut,
)
from kvasir.cluster.names import pool_name
from kvasir.cluster.pipelines import Over, Pipelines
from kvasir.cluster.pool_host import HUB, HUB_EPOCH
from kvasir.cluster.pool_messages import CopyBlocks, PeersChanged, Resync
from kvasir.cluster.service import ClusterStatus, InstanceStatus, Output, Rejected, RequestFailed, Submission
from kvasir.cluster.streams import HandOffStreams
from kvasir.core import commands
from kvasir.core.commands import Cancel, Candidate, Decision, Decode, Fail, Prefill, Reject, SetRole, ShareCores
from kvasir.core.errors import RequestError
from kvasir.core.events import (
    Aborted,
    Arrived,
    BlocksRemoved,
    BlocksStored,
    Event,
    Failed,
    Finished,
    Heartbeat,
    InstanceInfo,
    InstanceJoined,
    InstanceLoad,
    InstanceLost,
    NodeLost,
    PrefillDone,
    Tick,
)
from kvasir.core.keys import BlockKey, block_keys
from kvasir.core.pool_events import OwnerLost, PoolEvent, PoolStats, ReleaseLease
from kvasir.core.request import Request, Role
from kvasir.core.tier import Tier
from kvasir.engine.interface import ModelSpec, SampledToken
from kvasir.scheduling.conductor import Conductor
from kvasir.store.messenger.transport import Priority

TICK_S = 1.0
HEARTBEAT_DEADLINE_S = 20.0
"""An instance that is silent for so long is lost; a dead process is noticed at once by whoever started it."""

SOFT_FACTOR = 2.0
SOFT_LEAST_S = 0.1
"""A prefix that has not come within this many times the predicted seconds, and so much more, is computed instead."""

NUM_CHANGES = 4
"""Events in one message of a pool: removed and stored, in DRAM and on SSD."""

Send = Callable[[str, Message | PoolEvent], bool]
"""Delivers a message to a peer by name and says whether it could."""

Clock = Callable[[], float]

OnBlocks = Callable[[Sequence[BlockKey], Sequence[int], BlockKey | None, str], object]


def _nobody_listens(keys: Sequence[BlockKey], tokens: Sequence[int], parent: BlockKey | None, salt: str) -> None:
    return None


@dataclass(slots=True)
class _Live:
    """A request between its arrival and its end."""

    submission: Submission
    root: bytes
    keys: tuple[BlockKey, ...]
    deadline_s: float
    outputs: asyncio.Queue[Output | Reject | Fail]
    emitted: list[int] = field(default_factory=list)
    attempt: int = 0
    phase: Phase = Phase.BOTH
    cached: int | None = None
    prefilled: bool = False
    node: str = ""  # where it prefills, and its KV waits for whoever decodes
    tip: bytes | None = None  # key of the last full block of prompt and answer

    @property
    def run(self) -> str:
        """The name of the current attempt; what an earlier one still says is dropped."""
        return f"{self.submission.request_id}#{self.attempt}"


@dataclass(slots=True)
class _Instance:
    info: InstanceInfo
    load: InstanceLoad
    seen_s: float


class Hub:
    """Implements `Service` over the Conductor."""

    def __init__(
        self,
        spec: ModelSpec,
        conductor: Conductor,
        *,
        send: Send,
        clock: Clock,
        request_timeout_s: float,
    ):
        self._spec = spec
        self._conductor = conductor
        self._send = send
        self._clock = clock
        self._request_timeout_s = request_timeout_s
        self._live: dict[str, _Live] = {}
        self._instances: dict[str, _Instance] = {}
        self._pools: dict[str, PoolStats] = {}
        self._reports: dict[str, PoolReport] = {}
        self._peers: dict[str, PeerPool] = {}
        self._streams = HandOffStreams()
        self._pipelines = Pipelines()
        self._counters: Counter[str] = Counter()
        self._num_runs = 0
        self._drawn: Counter[str] = Counter()  # tokens by instance
        self._computed: Counter[str] = Counter()  # prompt tokens by instance
        self.on_silent: Callable[[str], None] = self.lose_instance
        """What to do about an instance that is silent: whoever started it must end it before its slots are given to others."""
        self.on_event: Callable[[Event, float], object] = lambda event, now: None
        """Hears each event and its time before the Conductor does: a recording of them replays to the same commands."""
        self.on_decision: Callable[[Decision], object] = lambda decision: None
        self.on_pool: Callable[[str], object] = lambda node: None
        """Hears of each node whose pool has started."""
        self.on_order_done: Callable[[OrderDone], object] = lambda done: None
        self.on_blocks: OnBlocks = _nobody_listens
        """Hears which tokens full blocks stand for: their keys, the tokens, the parent of the first, and the salt."""
        self._log = structlog.get_logger().bind(part="conductor")

    # --- the gateway's side: Service ---------------------------------------------------------------------------

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    async def submit(self, submission: Submission) -> AsyncGenerator[Output, None]:
        now = self._clock()
        request_id = submission.request_id
        if not 0 < len(submission.prompt) < self._spec.max_model_len or submission.max_tokens < 1:
            limit = self._spec.max_model_len - 1
            raise RequestError(f"a prompt of 1 to {limit} tokens and max_tokens of at least 1 are needed")
        if request_id in self._live:
            raise RequestError(f"request id {request_id!r} is in use", status=409, code="duplicate_request_id")
        root = self._spec.root_key(submission.salt)
        keys = tuple(block_keys(root, submission.prompt, self._spec.block_tokens))
        self.on_blocks(keys, submission.prompt, None, submission.salt)
        live = _Live(submission, root, keys, now + self._request_timeout_s, asyncio.Queue(), tip=keys[-1] if keys else None)
        self._live[request_id] = live
        try:
            request = Request(
                id=request_id,
                num_prompt_tokens=len(submission.prompt),
                max_tokens=submission.max_tokens,
                keys=keys,
                arrival_s=now,
                priority=submission.priority,
                tenant=submission.tenant,
            )
            self._apply(Arrived(request))
            while (output := await self._next(live)).finish_reason is None:
                yield output
            yield output
        finally:
            if self._live.get(request_id) is live:
                self._apply(Aborted(request_id))
                self._live.pop(request_id, None)
            self._streams.end(request_id)

    async def _next(self, live: _Live) -> Output:
        """The next output of a request. Raises Rejected, or RequestFailed also when the request's time is over."""
        try:
            async with asyncio.timeout(live.deadline_s - self._clock()):
                output = await live.outputs.get()
        except TimeoutError:
            request_id = live.submission.request_id
            message = f"no answer within {self._request_timeout_s:g} s; raise --request-timeout or ask for less"
            raise RequestFailed(Fail(request_id, "timeout", message)) from None
        if isinstance(output, Reject):
            raise Rejected(output)
        if isinstance(output, Fail):
            raise RequestFailed(output)
        return output

    def status(self) -> ClusterStatus:
        now = self._clock()
        instances = tuple(
            InstanceStatus(i.info, i.load, now - i.seen_s, self._drawn[name], self._computed[name])
            for name, i in sorted(self._instances.items(), key=lambda kv: kv[0])
        )
        ready = self._conductor.ready
        reason = "" if ready else "waiting for instances that can prefill and decode"
        return ClusterStatus(
            ready,
            reason,
            instances,
            dict(self._pools),
            dict(self._counters + Counter(self._conductor.counters)),
            {node: report.transports for node, report in self._reports.items()},
            {node: report.tenants for node, report in self._reports.items()},
        )

    # --- the instances' and pools' side ------------------------------------------------------------------------

    def take(self, peer: str, message: Message) -> None:
        """A message from an instance or a pool."""
        if (sender := self._instances.get(peer)) is not None:
            sender.seen_s = self._clock()
        match message:
            case StepOutput(instance=instance, tokens=tokens):
                self._drawn[instance] += len(tokens)
                for token in tokens:
                    self._take_token(instance, token)
            case HandedOff(run=run, instance=instance):
                self._take_hand_off(run, instance)
            case PipelineReady() | StageComputed() | StageLeft():
                self._take_from_stage(message)
            case InstanceReport(instance=name, epoch=epoch, load=load):
                self._take_report(name, epoch, load)
            case RunFailed(run=run, instance=instance, error=error):
                self._log.warning("run failed", run=run, instance=instance, error=error)
                if (live := self._current(run)) is not None:
                    self._apply(Failed(live.submission.request_id, instance, error))
            case BlocksChanged():
                self._take_changes(message)
            case PoolReport(node=node, stats=stats):
                self._pools[node] = stats
                self._reports[node] = message
            case HelloInstance(info=info):
                self._instances[info.id] = _Instance(info, InstanceLoad(), self._clock())
                self._log.info("instance joined", instance=info.id, role=info.role.value, node=info.node)
                self._apply(InstanceJoined(info))
            case HelloPool(node=node, num_slots=num_slots, peer=peer_pool):
                self._pools[node] = PoolStats(slots=num_slots, free=num_slots)
                self._introduce(node, peer_pool)
                self.on_pool(node)
            case OrderDone():
                self.on_order_done(message)
            case _:
                self._log.warning("unexpected message", peer=peer, message=type(message).__name__)

    def _take_from_stage(self, message: PipelineReady | StageComputed | StageLeft) -> None:
        match message:
            case PipelineReady():
                for instance, request in self._pipelines.ready(message):
                    self._tell_stage(instance, request)
            case StageComputed():
                if (following := self._pipelines.computed(message)) is not None:
                    self._tell_stage(*following)
                self._end_pipeline(self._pipelines.done(message))
            case StageLeft(run=run, instance=instance):
                self._end_pipeline(self._pipelines.left(run, instance))

    def _tell_stage(self, instance: str, message: RunRequest | ExtendRun) -> None:
        if not self._send(instance, message):
            self._end_pipeline(self._pipelines.left(message.run, instance))
            self._undelivered(message.run, instance)

    def _end_pipeline(self, over: Over | None) -> None:
        if over is not None:
            for lease in over.leases:
                self._send(pool_name(over.node), ReleaseLease(HUB, HUB_EPOCH, lease))

    def _take_changes(self, changes: BlocksChanged) -> None:
        """One message is four events, so that a lost message is a gap in their numbers."""
        node, first = changes.node, NUM_CHANGES * (changes.seq - 1) + 1
        self._apply(BlocksRemoved(node, first, changes.removed))
        self._apply(BlocksStored(node, first + 1, changes.stored))
        self._apply(BlocksRemoved(node, first + 2, changes.ssd_removed, Tier.SSD))
        self._apply(BlocksStored(node, first + 3, changes.ssd_stored, Tier.SSD))
        if changes.stored:
            holders = self._conductor.directory.holders
            for new in self._streams.stored(node, lambda key: node in holders(key)):
                self._send(pool_name(new.target), CopyBlocks(node, new.keys, Priority.HAND_OFF, new.tenant))

    def _introduce(self, node: str, peer: PeerPool | None) -> None:
        """Tell every pool who else there is."""
        if self._peers.get(node) == peer:
            return
        earlier = self._peers.pop(node, None)
        if earlier is not None and (peer is None or peer.epoch != earlier.epoch):
            self._bury_peer(earlier)
        if peer is not None:
            self._peers[node] = peer
        self._tell_peers()

    def _tell_peers(self) -> None:
        changed = PeersChanged(tuple(self._peers.values()))
        for node in self._peers:
            self._send(pool_name(node), changed)

    def _bury_peer(self, peer: PeerPool) -> None:
        """What a lost node's pool had leased elsewhere is free again."""
        for node in self._peers:
            self._send(pool_name(node), OwnerLost(pool_name(peer.node), peer.epoch))

    def lose_instance(self, name: str) -> None:
        """The instance's process is gone, or silent for too long."""
        instance = self._instances.pop(name, None)
        if instance is None:
            return
        self._log.warning("instance lost", instance=name)
        self._send(pool_name(instance.info.node), OwnerLost(name, instance.info.epoch))
        for over in self._pipelines.lost(name):
            self._end_pipeline(over)
        self._apply(InstanceLost(name, instance.info.epoch))

    def lose_node(self, node: str) -> None:
        """The node is gone, with its pool process, its instances, and every block."""
        self._pools.pop(node, None)
        self._reports.pop(node, None)
        self._introduce(node, None)
        self._apply(NodeLost(node))
        for name in [name for name, instance in self._instances.items() if instance.info.node == node]:
            self.lose_instance(name)

    def drain(self, node: str) -> None:
        """Give the node's instances nothing new."""
        for instance in self._instances.values():
            if instance.info.node == node:
                instance.info = replace(instance.info, role=Role.DRAINING)
                self._apply(InstanceJoined(instance.info))

    def is_idle(self, node: str) -> bool:
        """Whether no request is on the node's instances, nor will be."""
        names = {name for name, instance in self._instances.items() if instance.info.node == node}
        return not self._conductor.is_used(names)

    def node_of(self, instance: str) -> str:
        return self._instances[instance].info.node

    async def run_ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self._clock()
            for name, instance in list(self._instances.items()):
                if now - instance.seen_s > HEARTBEAT_DEADLINE_S:
                    self.on_silent(name)
            self._apply(Tick())

    def _take_token(self, instance: str, out: TokenOut) -> None:
        live = self._current(out.run)
        if live is None:
            return
        request_id = live.submission.request_id
        live.emitted.append(out.token)
        if (len(live.submission.prompt) + len(live.emitted)) % self._spec.block_tokens == 0:
            self._tell_block(live)
        first = live.cached is None
        if first:
            live.cached = out.cached or 0
        token = SampledToken(out.token, out.logprob, out.top)
        live.outputs.put_nowait(Output([token], live.cached if first else None, out.finish))
        if out.finish is not None:
            del self._live[request_id]
            self._apply(Finished(request_id, instance, out.finish, len(live.emitted)))
        elif live.phase is Phase.BOTH and not live.prefilled:
            self._prefill_done(live, instance)

    def _take_report(self, name: str, epoch: int, load: InstanceLoad) -> None:
        """An instance knows the pages in its hand; what else its node's pool could give is added here."""
        instance = self._instances.get(name)
        if instance is None:
            return
        pool = self._pools.get(instance.info.node, PoolStats())
        obtainable = (pool.free + pool.published - pool.leased) * self._spec.block_tokens
        instance.load = replace(load, free_kv_tokens=load.free_kv_tokens + obtainable)
        instance.seen_s = self._clock()
        self._apply(Heartbeat(name, epoch, instance.load))

    def _take_hand_off(self, run: str, instance: str) -> None:
        """The prompt's KV is on offer: somebody decodes it, or, when the request is over, nobody will."""
        live = self._current(run)
        if live is not None:
            self._prefill_done(live, instance)
        elif instance in self._instances:
            self._send(pool_name(self.node_of(instance)), ReleaseLease(HUB, HUB_EPOCH, run))

    def _prefill_done(self, live: _Live, instance: str) -> None:
        live.prefilled = True
        self._streams.end(live.submission.request_id)
        cached = live.cached or 0
        self._computed[instance] += len(live.submission.prompt) - cached
        self._apply(PrefillDone(live.submission.request_id, instance, cached))

    def _tell_block(self, live: _Live) -> None:
        """The answer has filled a block."""
        size, parent = self._spec.block_tokens, live.tip
        tokens = (live.submission.prompt[-size:] + live.emitted[-size:])[-size:]
        (live.tip,) = block_keys(parent or live.root, tokens, size)
        self.on_blocks((live.tip,), tokens, parent, live.submission.salt)

    def _current(self, run: str) -> _Live | None:
        live = self._live.get(run.rpartition("#")[0])
        return live if live is not None and live.run == run else None

    # --- the Conductor's side ----------------------------------------------------------------------------------

    def _apply(self, event: Event) -> None:
        now = self._clock()
        self.on_event(event, now)
        for command in self._conductor.handle(event, now):
            match command:
                case Prefill():
                    self._record(command.decision)
                    self._prefill(command)
                case Decode(request_id=request_id, instance=instance):
                    live, node = self._live[request_id], self.node_of(instance)
                    self._run(request_id, instance, Phase.DECODE, source=live.node if live.node != node else None)
                case Cancel(request_id=request_id, instance=instance):
                    self._pipelines.give_up(self._live[request_id].run)
                    self._send(instance, CancelRun(self._live[request_id].run))
                case Reject(request_id=request_id, decision=decision):
                    self._record(decision)
                    self._end(request_id, command)
                case Fail(request_id=request_id):
                    self._end(request_id, command)
                case ShareCores(instance=instance, with_prefill=with_prefill):
                    self._send(instance, Pace(with_prefill))
                case SetRole(instance=instance, role=role):
                    known = self._instances[instance]
                    known.info = replace(known.info, role=role)
                    self._log.info("role changed", instance=instance, role=role.value)
                    asyncio.get_running_loop().call_soon(self._confirm_role, known.info)
                case commands.Replicate(source=source, target=target, keys=keys):
                    self._counters["replications"] += 1
                    self._send(pool_name(target), CopyBlocks(source, keys))
                case commands.Resync(node=node):
                    self._send(pool_name(node), Resync())
                case _:
                    raise AssertionError(f"the Conductor said {command!r}")

    def _confirm_role(self, info: InstanceInfo) -> None:
        """Unless the instance was lost, or has another role by now: whoever is gone must not join again."""
        known = self._instances.get(info.id)
        if known is not None and known.info == info:
            self._apply(InstanceJoined(info))

    def _prefill(self, command: Prefill) -> None:
        live, instance = self._live[command.request_id], command.instance
        if live.phase is Phase.DECODE:  # whoever was to take the hand-off is gone, and it may be on offer still
            self._send(pool_name(live.node), ReleaseLease(HUB, HUB_EPOCH, live.run))
        self._num_runs += 1
        live.attempt = self._num_runs
        live.prefilled = False
        live.node = self.node_of(instance)
        phase = Phase.BOTH if command.decode == instance else Phase.PREFILL
        self._stream(command, live)
        candidate = command.candidate
        prefix = self._prefix_plan(candidate, live)
        self._run(command.request_id, instance, phase, rank=command.rank, prefix=prefix, group=candidate.group)

    def _stream(self, command: Prefill, live: _Live) -> None:
        """Let the blocks follow to whoever is to decode, where that is another node; who decodes may change at the end."""
        self._streams.end(command.request_id)
        decode = self._instances.get(command.decode)
        if decode is not None and decode.info.node != live.node:
            cached = command.candidate.prefix_tokens // self._spec.block_tokens
            self._streams.begin(
                command.request_id, live.node, decode.info.node, live.keys, cached=cached, tenant=live.submission.tenant
            )

    def _prefix_plan(self, candidate: Candidate, live: _Live) -> PrefixPlan | None:
        """What to bring to DRAM first, from whoever has it; None when what is there is all that is wanted."""
        if candidate.source is None and not candidate.load_tokens:
            return None
        blocks = candidate.prefix_tokens // self._spec.block_tokens
        within_s = SOFT_FACTOR * candidate.transfer_s + SOFT_LEAST_S
        hidden_s = candidate.prefill_s * (1.0 - 1.0 / self._spec.shape.num_layers)
        sources: tuple[str, ...] = ()
        if candidate.source is not None:
            holders = self._conductor.directory.holders(live.keys[blocks - 1])
            others = (candidate.source, *(node for node in holders if node != candidate.source))
            sources = tuple(node for node in others if node != live.node)
        return PrefixPlan(blocks, sources, within_s, hidden_s)

    def _run(
        self,
        request_id: str,
        instance: str,
        phase: Phase,
        *,
        rank: float | None = None,
        prefix: PrefixPlan | None = None,
        source: str | None = None,
        group: tuple[str, ...] = (),
    ) -> None:
        live = self._live[request_id]
        live.phase = phase
        submission = live.submission
        prompt = submission.prompt
        message = RunRequest(
            run=live.run,
            phase=phase,
            tokens=np.asarray(prompt + live.emitted, dtype="<u4").tobytes(),
            max_total_tokens=min(len(prompt) + submission.max_tokens, self._spec.max_model_len),
            sampling=submission.sampling,
            stop_tokens=submission.stop_tokens + (() if submission.ignore_eos else self._spec.eos_token_ids),
            root=live.root,
            priority=submission.priority,
            rank=rank,
            prefix=prefix,
            source=source,
            tenant=submission.tenant,
            stage=StagePlan(len(group) - 1, len(group)) if group else None,
        )
        if not self._send(instance, message):
            self._undelivered(live.run, instance)
        elif group:
            self._counters["pipelines"] += 1
            self._pipelines.begin(message, group, live.node)

    def _undelivered(self, run: str, instance: str) -> None:
        self._counters["undelivered"] += 1
        if (live := self._current(run)) is not None:
            failed = Failed(live.submission.request_id, instance, "not reachable")
            asyncio.get_running_loop().call_soon(self._apply, failed)

    def _end(self, request_id: str, outcome: Reject | Fail) -> None:
        live = self._live.pop(request_id, None)
        if live is not None:
            live.outputs.put_nowait(outcome)

    def _record(self, decision: Decision) -> None:
        self.on_decision(decision)
        self._counters[f"decisions_{decision.policy}"] += 1
        self._log.debug("decision", request=decision.request_id, chosen=decision.chosen, reason=decision.reason)
