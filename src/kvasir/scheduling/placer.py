"""From a request to a proposal: which instances, why, and whether it is worth starting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Final

from msgspec import structs
from mypy_extensions import mypyc_attr

from kvasir.core.commands import Candidate, Decision
from kvasir.core.request import Request, Slo
from kvasir.costs.model import CostModel
from kvasir.costs.quick import quick
from kvasir.pool.directory import BlockDirectory
from kvasir.pool.match import PrefixMatch
from kvasir.report.slo import ScaledSlo
from kvasir.scheduling.admission import MIN_RETRY_S, Admission, ttft_limit_s
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.decode_choice import DecodeChoice, DecodeRule, least_tbt
from kvasir.scheduling.few import FEW, RULES_OF_FEW, FewView
from kvasir.scheduling.fleet import Fleet
from kvasir.scheduling.instance import Seat
from kvasir.scheduling.many import RULES_OF_MANY
from kvasir.scheduling.plan import Plan, Refusal
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.policies.interface import Placement, PlacementOfFew
from kvasir.scheduling.ranks import Rank, first_come
from kvasir.scheduling.view import ClusterView, DecodeView

PRIOR_WEIGHT: Final = 32
"""The configured expectation of output lengths counts as so many answers seen."""

MEMORY: Final = 2000
"""Answers over which the mean output length is learned: some minutes of traffic on a busy cluster."""

TTFT_MEMORY: Final = 100
"""Placements over which the mean predicted TTFT is taken: it follows a queue that builds up within seconds."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The exchangeable parts of a placement."""

    policy: Placement
    admission: Admission
    decode: DecodeRule = least_tbt
    rank: Rank = first_come


@mypyc_attr(acyclic=True)
class Proposal:
    """Where a request would go, at which place in the queue, or, with a `refusal`, why it should not be started.

    Each instance of the plan will be at work for `work_s`; the first token is due at `due_s`.
    """

    __slots__ = ("choice", "decision", "decode", "due_s", "rank", "refusal", "work_s")

    def __init__(self, choice: Choice, decode: DecodeChoice, decision: Decision, *, rank: float, due_s: float, work_s: float):
        self.choice = choice
        self.decode = decode
        self.decision = decision
        self.rank = rank
        self.due_s = due_s
        self.work_s = work_s
        self.refusal: Refusal | None = None


class Placer:
    """Policy, admission and cost model over fleet and directory, which it only reads."""

    __slots__ = (
        "_config",
        "_costs",
        "_directory",
        "_expected_tokens",
        "_few",
        "_fleet",
        "_num_outputs",
        "_of_few",
        "_output_tokens",
        "_rng",
        "_rule_of_few",
        "_rule_of_many",
        "_rules",
        "_slo",
        "_ttft_s",
    )

    def __init__(
        self,
        config: ConductorConfig,
        costs: CostModel,
        *,
        rules: Rules,
        slo: Slo | ScaledSlo,
        rng: Random,
        fleet: Fleet,
        directory: BlockDirectory,
    ):
        self._config = config
        self._costs = quick(costs)
        self._rules = rules
        self._slo = slo
        self._of_few = rules.policy if isinstance(rules.policy, PlacementOfFew) else None
        self._rule_of_few = RULES_OF_FEW.get(rules.decode)
        self._few = FewView(
            fleet,
            tbt_s=slo.tbt_s,
            costs=self._costs,
            kv_bytes_per_token=config.kv_bytes_per_token,
            block_tokens=config.block_tokens,
            chunk_tokens=config.chunk_tokens,
            layerwise=config.layerwise,
            max_stages=config.max_stages,
            stages_on_one_node=config.stages_on_one_node,
            policy=self._of_few,
        )
        rule_of_many = RULES_OF_MANY.get(rules.decode)
        self._rule_of_many = partial(rule_of_many, fleet) if rule_of_many is not None else rules.decode
        self._rng = rng
        self._fleet = fleet
        self._directory = directory
        self._output_tokens = float(config.expected_output_tokens)
        self._expected_tokens = max(1, config.expected_output_tokens)
        self._num_outputs = PRIOR_WEIGHT
        self._ttft_s = 0.0
        fleet.answer_tokens = self._output_tokens

    def refuse_outright(self, request: Request, *, num_queued: int, now: float) -> Refusal | None:
        """What needs no placement to be refused: too large for any instance, or the queue is full."""
        tokens, most = request.num_prompt_tokens + request.max_tokens, self._fleet.max_kv_tokens
        if tokens > most:
            return Refusal("too_large", f"prompt and max_tokens are {tokens} tokens, the largest instance holds {most}", 0.0)
        if num_queued >= self._config.max_queued:
            drain_s = self._fleet.least_wait_s(now)
            return Refusal("queue_full", f"{num_queued} requests wait for their prefill already", max(MIN_RETRY_S, drain_s))
        return None

    def propose(self, request: Request, now: float) -> Proposal:
        """For a new request: placement, and a refusal if the admission rule says so."""
        proposal = self.replace(request, now)
        refusal = self._rules.admission.judge(self._plan(request, proposal, now), self._costs)
        if refusal is not None:
            proposal.refusal = refusal
            proposal.decision = structs.replace(proposal.decision, refusal=refusal.message)
        return proposal

    def replace(self, request: Request, now: float, avoid: frozenset[str] = frozenset()) -> Proposal:
        """For a request that was admitted before; `avoid` instances are used only if there are no others."""
        due_s = request.arrival_s + ttft_limit_s(self._slo, request.num_prompt_tokens, self._costs)
        rank = self._rank(request, due_s, now)
        match = self._match(request)
        choice: Choice | None = None
        if self._of_few is not None and not avoid and self._is_plain(match):
            few = self._few
            few.look(match, num_prompt_tokens=request.num_prompt_tokens, now=now, rank=rank, due_s=due_s)
            choice = self._of_few.place_few(few)
        if choice is None:
            choice = self._rules.policy.place(self._view(request, match, now, avoid, rank, due_s), self._rng)
        chosen = choice.chosen
        decode = self._decode(request, chosen, avoid)
        self._foresee(choice.ttft_s)
        work_s = self._costs.prompt_s(request.num_prompt_tokens, chosen.prefix_tokens, self._config.chunk_tokens)
        decision = self._decision(request, choice, decode, now)
        return Proposal(choice, decode, decision, rank=rank, due_s=due_s, work_s=work_s / len(choice.members))

    def decode_only(self, request: Request, avoid: frozenset[str]) -> DecodeChoice:
        """A decode instance for a request whose KV is complete."""
        return self._decode(request, None, avoid)

    def refuse_hand_off(self, request: Request, choice: DecodeChoice | None, instance: str) -> Refusal | None:
        """Whether a rule that looks at decode load only when the prefill is done turns the request away then.

        A choice made earlier is judged on what its instance decodes now, without those that are still in prefill.
        """
        if not self._rules.admission.looks_again:
            return None
        return self._rules.admission.at_hand_off(choice or self._as_it_is(request, instance))

    def _as_it_is(self, request: Request, instance: str) -> DecodeChoice:
        outlook = self._fleet.outlook(instance, math.inf)
        batch, context = outlook.batch_now + 1, outlook.context_now + request.num_prompt_tokens
        fits = batch <= self._fleet[instance].info.max_batch
        return DecodeChoice(instance, self._costs.decode_step_s(batch, context), batch, context, fits, 0 if fits else 1)

    def refused(self, request: Request, refusal: Refusal, now: float) -> Decision:
        return Decision(request.id, self._rules.policy.name, now, refusal=refusal.message)

    def learn(self, output_tokens: int) -> None:
        """An answer had so many tokens."""
        self._num_outputs = min(self._num_outputs + 1, MEMORY)
        self._output_tokens += (output_tokens - self._output_tokens) / self._num_outputs
        self._expected_tokens = max(1, _nearest(self._output_tokens))
        self._fleet.answer_tokens = self._output_tokens

    def expected_output(self, request: Request) -> int:
        return min(request.max_tokens, self._expected_tokens)

    def kv_tokens(self, request: Request) -> int:
        """What the request is expected to hold at its end."""
        return request.num_prompt_tokens + self.expected_output(request)

    def seat(self, request: Request, joins_s: float, stays_s: float) -> Seat:
        """Its decode steps are expected to read the prompt and half of the output, on average over its stay."""
        prompt: int = request.num_prompt_tokens
        output = self.expected_output(request)
        return Seat(prompt + output // 2, prompt + output, joins_s, stays_s)

    def _foresee(self, ttft_s: float) -> None:
        """A placement predicts this TTFT: keep the mean of the last ones."""
        self._ttft_s += (ttft_s - self._ttft_s) / TTFT_MEMORY
        self._fleet.ttft_s = self._ttft_s

    def _rank(self, request: Request, due_s: float, now: float) -> float:
        return self._rules.rank(now, due_s, self._costs.prefill_s(request.num_prompt_tokens, 0))

    def _plan(self, request: Request, proposal: Proposal, now: float) -> Plan:
        choice, decode = proposal.choice, proposal.decode
        return Plan(
            request=request,
            candidate=choice.chosen,
            decode=decode,
            ttft_s=max(0.0, now - request.arrival_s) + choice.ttft_s,
            expected_output_tokens=self.expected_output(request),
            spare_s=min([self._fleet.spare_s(name, now, proposal.rank) for name in choice.members]),
            outlook=self._fleet.outlook(decode.instance, now + choice.ttft_s),
        )

    def _decode(self, request: Request, prefill: Candidate | None, avoid: frozenset[str]) -> DecodeChoice:
        kv_tokens = self.kv_tokens(request)
        if self._rule_of_few is not None and not avoid and len(self._fleet) <= FEW:
            few = self._few
            few.num_prompt_tokens = request.num_prompt_tokens
            return self._rule_of_few(few, prefill, kv_tokens)
        view = DecodeView(
            decodes=self._fleet.decode_columns(avoid),
            num_prompt_tokens=request.num_prompt_tokens,
            costs=self._costs,
            kv_bytes_per_token=self._config.kv_bytes_per_token,
            tbt_s=self._slo.tbt_s,
        )
        rule = self._rules.decode if avoid else self._rule_of_many
        return rule(view, prefill, kv_tokens)

    def _match(self, request: Request) -> PrefixMatch:
        """At least one prompt token is always computed, so only whole blocks before it count as a prefix."""
        usable = max(0, request.num_prompt_tokens - 1) // self._config.block_tokens
        return self._directory.match(request.keys[:usable])

    def _is_plain(self, match: PrefixMatch) -> bool:
        """Whether there is nothing to load from an SSD."""
        return not self._config.load_bandwidth or match.runs_any == match.runs

    def _view(
        self, request: Request, match: PrefixMatch, now: float, avoid: frozenset[str], rank: float, due_s: float
    ) -> ClusterView:
        config = self._config
        block_tokens = config.block_tokens
        return ClusterView(
            prefills=self._fleet.prefill_columns(match, block_tokens=block_tokens, now=now, rank=rank, avoid=avoid),
            decodes=self._fleet.decode_columns(avoid),
            num_prompt_tokens=request.num_prompt_tokens,
            best_tokens=match.best * block_tokens,
            source=match.source,
            costs=self._costs,
            kv_bytes_per_token=config.kv_bytes_per_token,
            block_tokens=block_tokens,
            due_in_s=due_s - now,
            tbt_s=self._slo.tbt_s,
            chunk_tokens=config.chunk_tokens,
            load_bandwidth=config.load_bandwidth,
            layerwise=config.layerwise,
            max_stages=config.max_stages if not avoid else 1,  # one alone can wait for what a pipeline did not get
            stage_node=self._node_of if config.stages_on_one_node else None,
        )

    def _node_of(self, instance: str) -> str:
        known = self._fleet.get(instance)
        assert known is not None, "only the living are in a view"
        return known.node

    def _decision(self, request: Request, choice: Choice, decode: DecodeChoice, now: float) -> Decision:
        return Decision(
            request_id=request.id,
            policy=self._rules.policy.name,
            at_s=now,
            why=choice.why,
            candidates=choice.candidates,
            decode=decode.instance,
            tbt_s=decode.tbt_s,
            batch=decode.batch,
            has_room=decode.fits,
        )


def _nearest(number: float) -> int:
    """As `round`, for a number that is not negative: that takes twenty times as long."""
    whole = int(number)
    rest = number - whole
    return whole + 1 if rest > 0.5 or (rest == 0.5 and whole % 2) else whole
