"""The brain of the cluster: admits or rejects each request, places it, and places it again when an instance dies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Set
from random import Random
from typing import Any, Final

from msgspec import structs

from kvasir.core import events as ev
from kvasir.core.commands import Cancel, Command, Decision, Decode, Fail, Prefill, Reject, Replicate, Resync, SetRole
from kvasir.core.errors import InvariantError
from kvasir.core.keys import BlockKey
from kvasir.core.request import Request, Slo
from kvasir.core.tier import Tier
from kvasir.costs.model import CostModel
from kvasir.costs.quick import quick
from kvasir.pool.directory import BlockDirectory
from kvasir.report.slo import ScaledSlo
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.cores import CoreSharing
from kvasir.scheduling.decode_choice import DecodeChoice
from kvasir.scheduling.fleet import Fleet
from kvasir.scheduling.instance import Instance
from kvasir.scheduling.placed import Homeless, Placed, State
from kvasir.scheduling.placer import Placer, Proposal, Rules
from kvasir.scheduling.plan import Refusal
from kvasir.scheduling.replication import Replication
from kvasir.scheduling.roles import Roles

NOBODY: Final[frozenset[str]] = frozenset()


class Conductor:
    """Owns request states, fleet and block directory. `now` is in seconds and never goes back.

    Every request that arrives has exactly one outcome: Reject, Fail, Finished or Aborted. Events of requests that had
    theirs, and of instances that a request has left, are counted and otherwise ignored: they were on their way.
    """

    def __init__(
        self,
        config: ConductorConfig,
        costs: CostModel,
        *,
        rules: Rules,
        slo: Slo | ScaledSlo,
        rng: Random,
        roles: Roles | None = None,
        replication: Replication | None = None,
    ):
        self._config = config
        self._roles = roles
        self._replication = replication
        costs = quick(costs)  # one for all, so that all follow what is measured
        self._fleet = Fleet(costs, config.mixed_step_s)
        self._directory = BlockDirectory()
        self._placer = Placer(config, costs, rules=rules, slo=slo, rng=rng, fleet=self._fleet, directory=self._directory)
        self._requests: dict[str, Placed] = {}
        self._homeless: dict[str, Homeless] = {}
        self._cores = CoreSharing() if config.shares_cores else None
        self._num_prefilling = 0
        self.counters: dict[str, int] = defaultdict(int)

    def handle(self, event: ev.Event, now: float) -> list[Command]:
        """Raises InvariantError for an event that no correct body sends."""
        handler = _HANDLERS.get(type(event))
        if handler is None:
            raise InvariantError(f"a Conductor takes no {type(event).__name__}")
        return self._with_cores(handler(self, event, now))

    # What is said most often can be said without a message, too.

    def arrived(self, request: Request, now: float) -> list[Command]:
        return self._with_cores(self._arrived(request, now))

    def prefill_done(self, request_id: str, instance: str, now: float) -> list[Command]:
        return self._with_cores(self._prefill_done(request_id, instance, now))

    def finished(self, request_id: str, instance: str, output_tokens: int, now: float) -> list[Command]:
        return self._with_cores(self._finished(request_id, instance, output_tokens, now))

    def heartbeat(self, instance: str, epoch: int, waiting_tokens: int, now: float) -> list[Command]:
        known = self._living(instance, epoch)
        if known is not None:
            self._fleet.reported(known, waiting_tokens, settle_s=self._config.settle_s, now=now)
        return self._with_cores([])

    def blocks_stored(self, node: str, seq: int, keys: tuple[BlockKey, ...], tier: Tier, now: float) -> list[Command]:
        return [Resync(node)] if self._directory.stored(node, seq, keys, tier) else []

    def blocks_removed(self, node: str, seq: int, keys: tuple[BlockKey, ...], tier: Tier, now: float) -> list[Command]:
        return [Resync(node)] if self._directory.removed(node, seq, keys, tier) else []

    @property
    def ready(self) -> bool:
        """Whether requests can be answered: an instance that prefills and one that decodes are up."""
        return self._fleet.missing_role is None

    @property
    def missing_role(self) -> str | None:
        """Why not ready: `prefill` or `decode`."""
        return self._fleet.missing_role

    @property
    def num_requests(self) -> int:
        return len(self._requests) + len(self._homeless)

    @property
    def instances(self) -> tuple[Instance, ...]:
        """Living instances by id, to be read only."""
        return self._fleet.instances

    @property
    def directory(self) -> BlockDirectory:
        """To be read only."""
        return self._directory

    def wants_report(self, instance: str, epoch: int) -> bool:
        """Whether a heartbeat of this incarnation would change anything: it has prefills to account for, or is not known."""
        known = self._fleet.get(instance)
        return known is None or len(known.book) > 0 or known.epoch != epoch

    def placed(self, request_id: str) -> Placed | None:
        """Where a request is, to be read only; None before its arrival and after its outcome."""
        return self._requests.get(request_id)

    def is_used(self, instances: Set[str]) -> bool:
        """Whether any request is on one of these instances, or will decode there."""
        return any(placed.decode in instances or not instances.isdisjoint(placed.holders) for placed in self._requests.values())

    def check(self) -> None:
        """Raises InvariantError unless requests, fleet and directory agree, both ways."""
        self._fleet.check()
        self._directory.check()
        num_prefilling = sum(placed.state is State.PREFILLING for placed in self._requests.values())
        if num_prefilling != self._num_prefilling:
            raise InvariantError(f"{self._num_prefilling} prefills counted, {num_prefilling} known")
        for instance in self._fleet.instances:
            seated = {request_id for request_id, placed in self._requests.items() if placed.decode == instance.info.id}
            if seated != set(instance.seats):
                raise InvariantError(f"{instance.info.id}: seats {sorted(instance.seats)}, decode there {sorted(seated)}")
        lost = sorted({name for placed in self._requests.values() for name in placed.holders if name not in self._fleet})
        if lost:
            raise InvariantError(f"requests are held by instances that are gone: {lost}")
        if self._homeless and self._fleet.missing_role is None:
            raise InvariantError(f"requests wait for an instance though there is one: {sorted(self._homeless)}")
        if both := sorted(self._requests.keys() & self._homeless.keys()):
            raise InvariantError(f"requests are placed and wait to be placed: {both}")

    # --- requests ---

    def _arrived(self, request: Request, now: float) -> list[Command]:
        if request.id in self._requests or request.id in self._homeless:
            raise InvariantError(f"{request.id} arrived twice")
        self.counters["arrived"] += 1
        if self._fleet.missing_role is not None:
            return [self._fail(request.id, "no_instance", f"no {self._fleet.missing_role} instance is up")]
        refusal = self._placer.refuse_outright(request, num_queued=self._num_prefilling, now=now)
        if refusal is not None:
            return [self._reject(request, refusal, self._placer.refused(request, refusal, now))]
        proposal = self._placer.propose(request, now)
        commands: list[Command] = []
        if proposal.refusal is not None:
            commands.append(self._reject(request, proposal.refusal, proposal.decision))
        else:
            commands.append(self._start(request, proposal, now))
            commands += self._replicate(request, proposal, now)
        if not proposal.decode.fits:
            commands += self._review(now)
        return commands

    def _replicate(self, request: Request, proposal: Proposal, now: float) -> list[Replicate]:
        if self._replication is None:
            return []
        candidate = proposal.choice.chosen
        prefix = request.keys[: candidate.prefix_tokens // self._config.block_tokens]
        return self._replication.placed(prefix, candidate, self._fleet, self._directory, now)

    def _held_by(self, instance: str, request_id: str) -> Placed | None:
        """The request, if it is on `instance`. Else what was said of it was on its way, and is counted."""
        placed = self._requests.get(request_id)
        if placed is None:
            self.counters["late_events"] += 1
            return None
        if instance not in placed.holders:
            self.counters["stale_events"] += 1
            return None
        return placed

    def _was_homeless(self, request_id: str) -> bool:
        """Whether the request waited for an instance; it does no longer."""
        if request_id not in self._homeless:
            return False
        del self._homeless[request_id]
        return True

    def _prefill_done(self, request_id: str, instance: str, now: float) -> list[Command]:
        placed = self._held_by(instance, request_id)
        if placed is None:
            return []
        if placed.state is State.DECODING:  # said of an earlier attempt, by an instance that has it again
            self.counters["stale_events"] += 1
            return []
        request = placed.request
        if placed.decode is None and self._fleet.missing_role == "decode":
            return [Cancel(request.id, placed.prefill), *self._place_again(placed, "there was nobody to decode", now)]
        choice = self._placer.decode_only(request, placed.failed_on) if placed.decode is None else None
        if (refusal := self._refused_late(placed, choice, now)) is not None:
            return refusal
        self._prefill_over(placed, now)
        if choice is not None:
            self._sit(placed, choice, now, now)
        decode = placed.decoder
        self._fleet.take_seat(decode, request_id, now)
        placed.state = State.DECODING
        return [Decode(request_id, decode, placed.prefill)] if placed.hands_off else []

    def _refused_late(self, placed: Placed, choice: DecodeChoice | None, now: float) -> list[Command] | None:
        """The rejection of a request whose prefill is spent, by rules that look at decode load only now."""
        request = placed.request
        refusal = self._placer.refuse_hand_off(request, choice, placed.decoder if choice is None else choice.instance)
        if refusal is None:
            return None
        self._forget(placed, now)
        self.counters["rejected_after_prefill"] += 1
        return [Cancel(request.id, placed.prefill), self._reject(request, refusal, self._placer.refused(request, refusal, now))]

    def _finished(self, request_id: str, instance: str, output_tokens: int, now: float) -> list[Command]:
        if self._was_homeless(request_id):
            self.counters["finished"] += 1
            return []
        placed = self._held_by(instance, request_id)
        if placed is None:
            return []
        self._placer.learn(output_tokens)
        self._forget(placed, now)
        self.counters["finished"] += 1
        return []

    def _aborted(self, event: ev.Aborted, now: float) -> list[Command]:
        placed = self._requests.get(event.request_id)
        if placed is None:
            self.counters["aborted" if self._was_homeless(event.request_id) else "late_events"] += 1
            return []
        self._forget(placed, now)
        self.counters["aborted"] += 1
        return [Cancel(placed.request.id, name) for name in placed.holders]

    def _failed(self, event: ev.Failed, now: float) -> list[Command]:
        placed = self._held_by(event.instance, event.request_id)
        if placed is None:
            return []
        placed.failed_on |= {event.instance}
        stops = [Cancel(placed.request.id, name) for name in placed.holders if name != event.instance]
        return [*stops, *self._place_again(placed, f"{event.instance}: {event.error}", now)]

    def _place_again(self, placed: Placed, why: str, now: float) -> list[Command]:
        """The request was admitted and its stream may have begun, so it is not rejected any more; it may have to wait."""
        request = placed.request
        self._forget(placed, now)
        if placed.attempts >= self._config.max_attempts:
            return [self._fail(request.id, "attempts_exhausted", f"gave up after {placed.attempts} attempts; {why}")]
        if self._fleet.missing_role is not None:
            self._homeless[request.id] = Homeless(placed, why, now)
            self.counters["homeless"] += 1
            return []
        self.counters["placed_again"] += 1
        return [self._start(request, self._placer.replace(request, now, placed.failed_on), now, before=placed)]

    def _house(self, now: float) -> list[Command]:
        """Place the requests that waited for an instance, now that there is one of each role."""
        if self._fleet.missing_role is not None:
            return []
        waiting, self._homeless = self._homeless, {}
        commands: list[Command] = []
        for homeless in waiting.values():  # one after the other, so that each sees the load of those before it
            placed = homeless.placed
            proposal = self._placer.replace(placed.request, now, placed.failed_on)
            commands.append(self._start(placed.request, proposal, now, before=placed))
        self.counters["placed_again"] += len(commands)
        return commands

    def _give_up(self, now: float) -> list[Command]:
        """Fail the requests that waited too long for an instance."""
        over = [h for h in self._homeless.values() if now - h.since_s >= self._config.homeless_s]
        for homeless in over:
            del self._homeless[homeless.placed.request.id]
        role = self._fleet.missing_role
        return [self._fail(h.placed.request.id, "no_instance", f"no {role} instance came back; {h.why}") for h in over]

    def _start(self, request: Request, proposal: Proposal, now: float, before: Placed | None = None) -> Prefill:
        choice, decode = proposal.choice, proposal.decode
        chosen = choice.chosen
        request_id, prefill = request.id, chosen.instance
        placed = Placed(
            request,
            prefill,
            group=chosen.group,
            hands_off=prefill != decode.instance,
            attempts=before.attempts + 1 if before else 1,
            failed_on=before.failed_on if before else NOBODY,
        )
        self._requests[request_id] = placed
        self._num_prefilling += 1
        tokens: int = request.num_prompt_tokens - chosen.prefix_tokens
        for name in placed.members:
            self._fleet.sent(
                name,
                request_id,
                seconds=proposal.work_s,
                tokens=tokens,
                now=now,
                rank=proposal.rank,
                due_s=proposal.due_s,
            )
        self._sit(placed, decode, now + choice.ttft_s, now)
        return Prefill(request_id, prefill, decode.instance, chosen, proposal.decision, proposal.rank)

    def _sit(self, placed: Placed, decode: DecodeChoice, joins_s: float, now: float) -> None:
        request = placed.request
        placed.decode = decode.instance
        stays_s = self._fleet.stays_s(self._fleet[decode.instance])
        self._fleet.sit(decode.instance, request.id, self._placer.seat(request, joins_s, stays_s), now)

    def _prefill_over(self, placed: Placed, now: float) -> None:
        self._num_prefilling -= 1
        for name in placed.members:
            self._fleet.done(name, placed.request.id, now)

    def _forget(self, placed: Placed, now: float) -> None:
        """Take back all that was booked for the request."""
        if placed.state is State.PREFILLING:
            self._prefill_over(placed, now)
        if placed.decode is not None:
            self._fleet.leave(placed.decode, placed.request.id, now)
        del self._requests[placed.request.id]

    def _reject(self, request: Request, refusal: Refusal, decision: Decision) -> Reject:
        self.counters[f"rejected_{refusal.code}"] += 1
        return Reject(request.id, refusal.code, refusal.message, refusal.retry_after_s, decision)

    def _fail(self, request_id: str, code: str, message: str) -> Fail:
        self.counters[f"failed_{code}"] += 1
        return Fail(request_id, code, message)

    # --- the cluster ---

    def _instance_joined(self, event: ev.InstanceJoined, now: float) -> list[Command]:
        info = event.info
        known = self._fleet.get(info.id)
        if known is not None and known.info.epoch > info.epoch:
            self.counters["stale_events"] += 1
            return []
        if known is not None and known.info.epoch == info.epoch:
            self._fleet.update(info)
            return self._house(now)
        return self._replace_instance(info.id, info, f"{info.id} started again", now)

    def _instance_lost(self, event: ev.InstanceLost, now: float) -> list[Command]:
        if self._living(event.instance, event.epoch) is None:
            return []
        return self._replace_instance(event.instance, None, f"{event.instance} was lost", now)

    def _replace_instance(self, instance: str, successor: ev.InstanceInfo | None, why: str, now: float) -> list[Command]:
        """Place again what the instance held; what was only to decode there gets another seat when its prefill is done."""
        held = [placed for placed in self._requests.values() if instance in placed.holders]
        for placed in self._requests.values():
            if placed.decode == instance and placed.state is State.PREFILLING:
                placed.decode = None
        self._fleet.lose(instance, now)
        if successor is not None:
            self._fleet.join(successor)
        stops = [Cancel(placed.request.id, name) for placed in held for name in placed.holders if name != instance]
        again = [command for placed in held for command in self._place_again(placed, why, now)]
        return [*stops, *again, *self._house(now), *self._review(now)]

    def _heartbeat(self, event: ev.Heartbeat, now: float) -> list[Command]:
        known, load = self._living(event.instance, event.epoch), event.load
        if known is not None:
            known.prefill_scale, known.decode_scale = load.prefill_scale, load.decode_scale
            self._fleet.reported(known, load.waiting_tokens, settle_s=self._config.settle_s, now=now)
        return []

    def _living(self, instance: str, epoch: int) -> Instance | None:
        """This incarnation, if it is known. Else what was said of it is stale, and is counted."""
        known = self._fleet.get(instance)
        if known is None or known.epoch != epoch:
            self.counters["stale_events"] += 1
            return None
        return known

    def _with_cores(self, commands: list[Command]) -> list[Command]:
        """And who has to share cores differently by now."""
        if self._cores is not None:
            commands += self._cores.commands(self._fleet.instances)
        return commands

    def _inventory(self, event: ev.Inventory, now: float) -> list[Command]:
        self._directory.inventory(event.node, event.seq, event.keys, event.ssd_keys)
        return []

    def _node_lost(self, event: ev.NodeLost, now: float) -> list[Command]:
        self._directory.drop(event.node)
        return []

    def _tick(self, event: ev.Tick, now: float) -> list[Command]:
        self._fleet.calibrate()
        expired = self._fleet.expire(sent_before_s=now - self._config.prediction_ttl_s, now=now)
        self.counters["expired_predictions"] += expired
        return [*self._give_up(now), *(Resync(node) for node in self._directory.stale_nodes), *self._review(now)]

    def _review(self, now: float) -> list[SetRole]:
        """Let roles follow the load. A change counts at once; the body confirms it by introducing the instance again."""
        if self._roles is None:
            return []
        changes = self._roles.review(self._fleet, now)
        for change in changes:
            known = self._fleet.get(change.instance)
            assert known is not None, "only living instances change their role"
            self._fleet.update(structs.replace(known.info, role=change.role))
        self.counters["role_changes"] += len(changes)
        return changes


_HANDLERS: Final[dict[type[ev.Event], Callable[[Conductor, Any, float], list[Command]]]] = {
    ev.Heartbeat: Conductor._heartbeat,
    ev.BlocksStored: lambda self, event, now: self.blocks_stored(event.node, event.seq, event.keys, event.tier, now),
    ev.BlocksRemoved: lambda self, event, now: self.blocks_removed(event.node, event.seq, event.keys, event.tier, now),
    ev.Arrived: lambda self, event, now: self._arrived(event.request, now),
    ev.PrefillDone: lambda self, event, now: self._prefill_done(event.request_id, event.instance, now),
    ev.Finished: lambda self, event, now: self._finished(event.request_id, event.instance, event.output_tokens, now),
    ev.Aborted: Conductor._aborted,
    ev.Failed: Conductor._failed,
    ev.Inventory: Conductor._inventory,
    ev.NodeLost: Conductor._node_lost,
    ev.InstanceJoined: Conductor._instance_joined,
    ev.InstanceLost: Conductor._instance_lost,
    ev.Tick: Conductor._tick,
}
"""All that a Conductor is told."""
