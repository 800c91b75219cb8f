"""Roles that follow the load: what the decoding needs decodes, in the way that leaves most for prefill."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Protocol

from kvasir.core.commands import SetRole
from kvasir.core.request import Role
from kvasir.costs.model import CostModel
from kvasir.costs.quick import quick
from kvasir.scheduling.decode_choice import FULL
from kvasir.scheduling.fleet import LEAST_PACE, Fleet
from kvasir.scheduling.instance import Instance

CALM: Final = 0.85
"""Share of its network that an instance's incoming KV may use on average. Most hand-offs are hidden by a prefill that takes ten
times as long."""

HOLD_S: Final = 10.0
"""For so long other roles must be better before they are taken, unless too few decode: about half of an answer."""

STEEP: Final = 1.0 / (2.0 * (1.0 - FULL))
"""Where a little less than the demand of decoding is met, so many times that share of the answers is late: what is left beyond
FULL makes up for an error in the demand of up to 1 - FULL either way, and where it does not, the whole batch is late. Prefill
that is short makes only those late, or refused, that it is short for."""

NOTHING: Final = 1e-9
"""Demand is never nothing, so that it divides."""


class Roles(Protocol):
    """Looks at the fleet and says who should change; it is asked at every tick and after each placement without room."""

    def review(self, fleet: Fleet, now: float) -> list[SetRole]: ...


class Demand:
    """What decoding would take of one instance, if that did it all, in shares of what it has.

    `held`: of its KV memory or seats, whichever is scarcer, for each second that a step takes, since who decodes more slowly
    stays longer. `steps`: of its time, beyond the fixed part of each step. `network`: of what incoming KV may use.
    """

    __slots__ = ("held", "network", "steps")

    def __init__(self, held: float, steps: float, network: float):
        self.held = held
        self.steps = steps
        self.network = network


class Elastic:
    """Lets as many instances decode as the requests given to them need, in the way that leaves most for prefill.

    Where there are too few for both, in the way that lets most through. An instance with the role `decode` does nothing else.
    Its steps are as short as its batch allows, so that fewer answers are under way at a time and it meets more of the demand.
    A `mixed` one takes prefill in the slack of steps of `step_s`. While some instances have nothing to prefill, half of these
    are `mixed`, too: KV then comes in by more networks, and a burst of hand-offs shows less.
    """

    def __init__(self, costs: CostModel, tbt_s: float, step_s: float, transfer_s: Callable[[int], float]):
        """`transfer_s` predicts the seconds that the KV of so many tokens takes from node to node."""
        self._costs = quick(costs)
        self._fixed_s = self._chunk_s = 0.0  # what the least step of either phase takes, at the last review
        self._step_s = step_s
        self._longest_s = max(step_s, FULL * tbt_s)
        self._transfer_s = transfer_s
        self._since_s = math.inf
        self._idle = 0.0
        self._busy = 0.0
        self._seen_s = math.inf

    def review(self, fleet: Fleet, now: float) -> list[SetRole]:
        """At once if those that decode are too few, or nobody decodes; else what was better for HOLD_S."""
        self._fixed_s, self._chunk_s = self._costs.decode_step_s(1, 0), self._costs.prefill_s(1, 0)
        self._observe(fleet, now)
        demand, decoders = self._demand(fleet), fleet.decoders
        only = sum([not instance.can_prefill for instance in decoders])
        mixed = len(decoders) - only
        wanted = self._wanted(demand, len(fleet.instances), only, mixed)
        if wanted == (only, mixed):
            self._since_s = math.inf
            return []
        self._since_s = min(self._since_s, now)
        is_urgent = self._met(demand, only, mixed) < 1.0
        if not is_urgent and now - self._since_s < HOLD_S and any(instance.seats for instance in fleet.instances):
            return []
        self._since_s = math.inf
        return self._change(fleet, *wanted)

    def _observe(self, fleet: Fleet, now: float) -> None:
        """How many have nothing to prefill, and what share of those that may prefill do, on average over HOLD_S."""
        prefillers = fleet.prefillers
        idle = sum(not len(instance.book) for instance in fleet.instances)
        busy = sum(1 for instance in prefillers if len(instance.book)) / max(1, len(prefillers))
        gain = -math.expm1(min(0.0, self._seen_s - now) / HOLD_S)
        self._idle += (idle - self._idle) * gain
        self._busy += (busy - self._busy) * gain
        self._seen_s = now

    def _wanted(self, demand: Demand, count: int, only: int, mixed: int) -> tuple[int, int]:
        """How many of `count` instances should only decode, and how many be mixed; now `only` and `mixed` are."""
        enough = math.ceil(1.0 / self._beside(demand))
        spare = max(0, int((self._idle - enough) / 2))  # the other half takes bursts
        if spare:
            return 0, enough + spare
        return self._best(demand, count, self._busy * self._left(demand, count, only, mixed))

    def _change(self, fleet: Fleet, only: int, mixed: int) -> list[SetRole]:
        """Who decodes goes on with it, those with most to decode with nothing else; then come those with least to prefill."""

        def place(instance: Instance) -> tuple[bool, int, float, str]:
            info = instance.info
            return not info.role.can_decode, -instance.kv_tokens, instance.book.pending_s, info.id

        in_order = sorted(fleet.instances, key=place)
        roles = [Role.DECODE] * only + [Role.MIXED] * mixed + [Role.PREFILL] * (len(in_order) - only - mixed)
        return [SetRole(i.info.id, role) for i, role in zip(in_order, roles, strict=True) if i.info.role is not role]

    def _best(self, demand: Demand, count: int, prefill: float) -> tuple[int, int]:
        """What lets most through, where prefill takes `prefill` whole instances; of several, what leaves most for that."""
        best, most = (0, count), (0.0, 0.0)
        for only, mixed in self._ways(demand, count):
            left = self._left(demand, count, only, mixed)
            through = min(1.0, left / max(NOTHING, prefill), self._met(demand, only, mixed) ** STEEP)
            if (through, left) >= most:
                best, most = (only, mixed), (through, left)
        return best

    def _ways(self, demand: Demand, count: int) -> list[tuple[int, int]]:
        """For each number that only decode, as many mixed ones as meet the rest of the demand, and one less."""
        alone, beside = self._alone(demand), self._beside(demand)
        ways = []
        for only in range(min(count, math.ceil(1.0 / alone) + 1)):
            most = min(count - only, max(0 if only else 1, math.ceil((1.0 - only * alone) / beside)))
            ways += [(only, mixed) for mixed in (most - 1, most) if only + mixed > 0 and mixed >= 0]
        return ways

    def _met(self, demand: Demand, only: int, mixed: int) -> float:
        """The share of the demand that so many meet."""
        return only * self._alone(demand) + mixed * self._beside(demand)

    def _left(self, demand: Demand, count: int, only: int, mixed: int) -> float:
        """Prefill that `count` instances do when so many decode, in instances that do nothing else."""
        if not mixed:
            return count - only
        share = max(0.0, 1.0 - only * self._alone(demand)) / mixed
        return count - only - mixed + mixed * self._pace(demand, min(share, self._beside(demand)))

    def _alone(self, demand: Demand) -> float:
        """The share of the demand that one meets which does nothing else: its steps take fixed / (1 - share * steps)."""
        in_memory = FULL / (self._fixed_s * demand.held + FULL * demand.steps)
        in_time = max(NOTHING, 1.0 - self._fixed_s / self._longest_s) / demand.steps
        return min(in_memory, in_time, 1.0 / demand.network)

    def _beside(self, demand: Demand) -> float:
        """The share that one meets whose steps are filled up with prefill."""
        in_time = max(NOTHING, 1.0 - self._fixed_s / self._step_s) / demand.steps
        return min(FULL / (self._step_s * demand.held), in_time, 1.0 / demand.network)

    def _pace(self, demand: Demand, share: float) -> float:
        """Seconds of prefill in a second of one that meets so much of the demand beside."""
        return max(LEAST_PACE, 1.0 - (self._fixed_s + self._chunk_s) / self._step_s - share * demand.steps)

    def _demand(self, fleet: Fleet) -> Demand:
        held = steps = network = NOTHING
        for instance in fleet.instances:
            if not instance.seats:
                continue
            stays_s = fleet.stays_s(instance)
            expected = fleet.expected(instance, stays_s)
            decode_s = self._costs.decode_step_s(max(1, expected.batch), expected.context_tokens)
            step_s = max(decode_s, self._step_s) if len(instance.book) else decode_s
            held += max(expected.kv_tokens / max(1, instance.max_kv_tokens), expected.batch / instance.max_batch) / step_s
            steps += (decode_s - self._fixed_s) / step_s
            network += self._transfer_s(expected.context_tokens) / stays_s / CALM  # came within a stay
        return Demand(held, steps, network)


ROLES: dict[str, Callable[[CostModel, float, float, Callable[[int], float]], Roles | None]] = {
    "static": lambda costs, tbt_s, step_s, transfer_s: None,
    "elastic": Elastic,
}
"""Name on the command line → (costs, TBT, longest step beside prefill, seconds to transfer tokens) → rule; None: roles stay."""
