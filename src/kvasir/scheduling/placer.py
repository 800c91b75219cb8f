"""From a request to a proposal: which instances, why, and whether it is worth starting."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from msgspec import Struct

from kvasir.core.commands import Decision
from kvasir.core.errors import ConfigError
from kvasir.core.request import Request
from kvasir.core.units import format_duration
from kvasir.costs.model import CostModel
from kvasir.pool.directory import BlockDirectory
from kvasir.scheduling.admission import MIN_RETRY_S, Admission, Plan, Refusal
from kvasir.scheduling.decode_choice import DecodeChoice, choose_decode
from kvasir.scheduling.fleet import Fleet
from kvasir.scheduling.policies.interface import Choice, Placement
from kvasir.scheduling.view import ClusterView


@dataclass(frozen=True, slots=True)
class ConductorConfig:
    """Sizes and bounds of a cluster's scheduler.

    `max_queued` bounds requests whose prefill is not done. A request is placed at most `max_attempts` times. An output is
    expected to have `expected_output_tokens`, or the request's max_tokens if that is less. A heartbeat may not have seen
    what was sent within the last `settle_s`; a prefill overdue by `prediction_ttl_s` no longer counts as waiting time.
    A request whose instance died waits `homeless_s` for another when none is left.
    `shares_cores`: prefill and decode instances of a node run on the same cores.
    """

    kv_bytes_per_token: int
    block_tokens: int = 64
    max_queued: int = 1024
    max_attempts: int = 3
    expected_output_tokens: int = 512
    settle_s: float = 0.5
    prediction_ttl_s: float = 60.0
    homeless_s: float = 60.0
    shares_cores: bool = False

    def __post_init__(self) -> None:
        for name, value in (
            ("kv_bytes_per_token", self.kv_bytes_per_token),
            ("block_tokens", self.block_tokens),
            ("max_queued", self.max_queued),
            ("max_attempts", self.max_attempts),
            ("expected_output_tokens", self.expected_output_tokens),
        ):
            if value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")


class Proposal(Struct, frozen=True):
    """Where a request would go, or, with a `refusal`, why it should not be started."""

    choice: Choice
    decode: DecodeChoice
    decision: Decision
    refusal: Refusal | None = None


class Placer:
    """Policy, admission and cost model over fleet and directory, which it only reads."""

    __slots__ = ("_admission", "_config", "_costs", "_directory", "_fleet", "_name", "_policy", "_rng")

    def __init__(
        self,
        config: ConductorConfig,
        costs: CostModel,
        *,
        policy: Placement,
        admission: Admission,
        rng: Random,
        fleet: Fleet,
        directory: BlockDirectory,
    ):
        self._config = config
        self._costs = costs
        self._policy = policy
        self._name = policy.name
        self._admission = admission
        self._rng = rng
        self._fleet = fleet
        self._directory = directory

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
        waited_s = max(0.0, now - request.arrival_s)
        plan = Plan(request, proposal.choice.chosen, proposal.decode, waited_s, self.expected_output(request))
        refusal = self._admission.judge(plan, self._costs)
        if refusal is None:
            return proposal
        reason = f"rejected, {refusal.message}: {proposal.decision.reason}"
        return Proposal(
            proposal.choice, proposal.decode, self._decision(request, proposal.choice, proposal.decode, reason, now), refusal
        )

    def replace(self, request: Request, now: float, avoid: frozenset[str] = frozenset()) -> Proposal:
        """For a request that was admitted before; `avoid` instances are used only if there are no others."""
        view = self._view(request, now, avoid)
        choice = self._policy.place(view, self._rng)
        decode = choose_decode(view, prefill=choice.chosen.instance, kv_tokens=self.kv_tokens(request))
        return Proposal(choice, decode, self._decision(request, choice, decode, _sentence(choice, decode), now))

    def decode_only(self, request: Request, now: float, avoid: frozenset[str]) -> str:
        """Another decode instance for a request whose first choice is gone."""
        return choose_decode(self._view(request, now, avoid), prefill=None, kv_tokens=self.kv_tokens(request)).instance

    def refused(self, request: Request, refusal: Refusal, now: float) -> Decision:
        return Decision(request.id, self._name, f"rejected, {refusal.message}", now)

    def expected_output(self, request: Request) -> int:
        return min(request.max_tokens, self._config.expected_output_tokens)

    def kv_tokens(self, request: Request) -> int:
        """What the request is expected to hold at its end."""
        return request.num_prompt_tokens + self.expected_output(request)

    def context_tokens(self, request: Request) -> int:
        """What its decode steps are expected to read, on average over its stay."""
        return request.num_prompt_tokens + self.expected_output(request) // 2

    def _view(self, request: Request, now: float, avoid: frozenset[str]) -> ClusterView:
        """At least one prompt token is always computed, so only whole blocks before it count as a prefix."""
        block_tokens = self._config.block_tokens
        usable = max(0, request.num_prompt_tokens - 1) // block_tokens
        match = self._directory.match(request.keys[:usable])
        return ClusterView(
            prefills=self._fleet.prefill_views(match, block_tokens=block_tokens, now=now, avoid=avoid),
            decodes=self._fleet.decode_views(avoid),
            num_prompt_tokens=request.num_prompt_tokens,
            best_tokens=match.best * block_tokens,
            source=match.source,
            costs=self._costs,
            kv_bytes_per_token=self._config.kv_bytes_per_token,
        )

    def _decision(self, request: Request, choice: Choice, decode: DecodeChoice, reason: str, now: float) -> Decision:
        return Decision(
            request_id=request.id,
            policy=self._name,
            reason=reason,
            at_s=now,
            chosen=choice.chosen.instance,
            decode=decode.instance,
            ttft_s=choice.chosen.ttft_s,
            tbt_s=decode.tbt_s,
            candidates=choice.candidates,
        )


def _sentence(choice: Choice, decode: DecodeChoice) -> str:
    """`prefill on p0 (least TTFT ...): wait 1.2 s + fetch ... + prefill ... = TTFT ...; decode on d1 at TBT ..., batch 12`."""
    c = choice.chosen
    fetch = f" + fetch of {c.fetch_tokens} tokens from {c.source} {format_duration(c.transfer_s)}" if c.source else ""
    room = "" if decode.fits else ", once there is room"
    return (
        f"prefill on {c.instance} by {choice.why}: wait {format_duration(c.wait_s)}{fetch}"
        f" + prefill {format_duration(c.prefill_s)} after {c.prefix_tokens} cached tokens = TTFT {format_duration(c.ttft_s)};"
        f" decode on {decode.instance} at TBT {format_duration(decode.tbt_s)} in a batch of {decode.batch}{room}"
    )
