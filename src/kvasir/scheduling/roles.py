"""Roles that follow the load: how many instances decode is what the decoding needs, the others prefill."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from kvasir.core.commands import SetRole
from kvasir.core.request import Role
from kvasir.costs.model import CostModel
from kvasir.scheduling.fleet import Fleet, Instance

FULL = 0.85
"""More instances decode when those that do would be used by more than this: what is not used up takes a burst."""

CALM = 0.35
"""Share of its network that an instance's incoming KV may use on average. Hand-offs come in bursts and share what there is;
beyond a third, a burst shows in the gap between the first token and the second."""

HOLD_S = 10.0
"""For so long fewer decode instances must be enough before half of those too many go back: about half of an answer."""


class Roles(Protocol):
    """Looks at the fleet and says who should change; it is asked at every tick and after each placement."""

    def review(self, fleet: Fleet, now: float) -> list[SetRole]: ...


class Elastic:
    """Keeps as many instances decoding as the requests given to them need, and no more.

    An instance that decodes is `mixed`: it also takes prefill in the slack that its steps leave within `step_s`. What it
    is used by is the largest share of three limits: KV memory, step time beyond a step's fixed part, and network for the KV
    that comes in. Shares add up over instances, because requests can be spread at will; so the number needed is their sum
    over FULL, rounded up.
    """

    def __init__(self, costs: CostModel, step_s: float, transfer_s: Callable[[int], float]):
        """`transfer_s` predicts the seconds that the KV of so many tokens takes from node to node."""
        self._costs = costs
        self._fixed_s = costs.decode_step_s(1, 0)
        self._slack_s = max(1e-9, step_s - self._fixed_s)
        self._transfer_s = transfer_s
        self._enough_since_s = -math.inf  # whatever roles a cluster starts with may be wrong at once

    def review(self, fleet: Fleet, now: float) -> list[SetRole]:
        decoders = fleet.decoders
        load = sum(self._load(fleet, instance) for instance in fleet.instances if instance.seats)
        needed = max(1, math.ceil(load / FULL))
        if needed > len(decoders):
            self._enough_since_s = math.inf
            return self._open(fleet, needed - len(decoders))
        if needed == len(decoders):
            self._enough_since_s = math.inf
            return self._refine(decoders)
        self._enough_since_s = min(self._enough_since_s, now)
        if now - self._enough_since_s < HOLD_S:
            return self._refine(decoders)
        self._enough_since_s = now
        idle_first = sorted(decoders, key=lambda i: (self._load(fleet, i), i.info.id))
        surplus = len(decoders) - needed
        return [SetRole(i.info.id, Role.PREFILL) for i in idle_first[: -(-surplus // 2)]]

    def _open(self, fleet: Fleet, count: int) -> list[SetRole]:
        """Those that still decode from earlier first, then those with the least to prefill."""
        idle = [i for i in fleet.instances if i.info.role is Role.PREFILL]
        idle.sort(key=lambda i: (-len(i.seats), i.book.pending_s, i.info.id))
        return [SetRole(i.info.id, Role.MIXED) for i in idle[:count]]

    def _refine(self, decoders: list[Instance]) -> list[SetRole]:
        """Instances that were started to decode only may take prefill as well."""
        return [SetRole(i.info.id, Role.MIXED) for i in decoders if i.info.role is Role.DECODE]

    def _load(self, fleet: Fleet, instance: Instance) -> float:
        info, expected = instance.info, fleet.expected(instance)
        step_s = self._costs.decode_step_s(max(1, expected.batch), expected.context_tokens)
        steps = (step_s - self._fixed_s) / self._slack_s
        arriving = self._transfer_s(expected.context_tokens) / fleet.stays_s  # all contexts came within an answer's stay
        memory = expected.kv_tokens / max(1, info.kv_tokens)
        return max(memory, steps, expected.batch / info.max_batch, arriving / CALM)


ROLES: dict[str, Callable[[CostModel, float, Callable[[int], float]], Roles | None]] = {
    "static": lambda costs, step_s, transfer_s: None,
    "elastic": Elastic,
}
"""Name on the command line → (costs, longest step of who decodes, seconds to transfer tokens) → rule; None: roles stay."""
