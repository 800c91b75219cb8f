"""Early rejection: whether a request is worth starting, judged before any work is spent on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct

from kvasir.core.commands import Candidate
from kvasir.core.request import Request, Slo
from kvasir.core.units import format_duration
from kvasir.costs.model import CostModel
from kvasir.report.slo import ScaledSlo
from kvasir.scheduling.decode_choice import DecodeChoice

MIN_RETRY_S = 0.1
"""Nobody is told to come back sooner; a client's round trip is about that long."""


class Plan(Struct, frozen=True):
    """What would be done with the request. `waited_s` has passed since it arrived at the gateway."""

    request: Request
    candidate: Candidate
    decode: DecodeChoice
    waited_s: float
    expected_output_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.waited_s + self.candidate.ttft_s


class Refusal(Struct, frozen=True):
    """Why not, for the client: `code` for machines, `message` for people, and when it is worth trying again."""

    code: str
    message: str
    retry_after_s: float


class Admission(Protocol):
    """Says no by a Refusal, yes by None."""

    def judge(self, plan: Plan, costs: CostModel) -> Refusal | None: ...


class Off:
    """Everything is admitted."""

    def judge(self, plan: Plan, costs: CostModel) -> Refusal | None:
        return None


@dataclass(frozen=True, slots=True)
class SloAdmission:
    """Reject what is predicted, on the load of now, to miss its SLO (Algorithm 1's last step)."""

    slo: Slo | ScaledSlo = field(default_factory=Slo)

    def judge(self, plan: Plan, costs: CostModel) -> Refusal | None:
        limit_s = ttft_limit_s(self.slo, plan.request.num_prompt_tokens, costs)
        if plan.ttft_s > limit_s:
            message = f"predicted TTFT {format_duration(plan.ttft_s)} exceeds the SLO of {format_duration(limit_s)}"
            drain_s = min(plan.ttft_s - limit_s, plan.candidate.wait_s)  # a queue drains a second per second
            return Refusal("slo_ttft", message, max(MIN_RETRY_S, drain_s))
        if plan.decode.tbt_s > self.slo.tbt_s:
            message = f"predicted TBT {format_duration(plan.decode.tbt_s)} exceeds the SLO of {format_duration(self.slo.tbt_s)}"
            return Refusal("slo_tbt", message, _shrink_s(plan, self.slo.tbt_s, costs))
        room_s = plan.decode.ahead * _next_leaver_s(plan)
        if plan.decode.tbt_s + _as_gap(room_s, plan.expected_output_tokens) > self.slo.tbt_s:
            full = f"{plan.decode.instance} has no room for another request before {format_duration(room_s)} have passed"
            return Refusal("decode_full", f"{full}, which would miss the TBT of {format_duration(self.slo.tbt_s)}", room_s)
        return None


ADMISSIONS: dict[str, Callable[[Slo | ScaledSlo], Admission]] = {"off": lambda slo: Off(), "slo": SloAdmission}
"""Name on the command line → a new admission rule for these objectives."""


def ttft_limit_s(slo: Slo | ScaledSlo, num_prompt_tokens: int, costs: CostModel) -> float:
    """The TTFT that a prompt of this length may take."""
    if isinstance(slo, Slo):
        return slo.ttft_s
    return max(slo.ttft_floor_s, slo.ttft_factor * costs.prefill_s(num_prompt_tokens, 0))


def _as_gap(seconds: float, output_tokens: int) -> float:
    """What one gap of this length adds to a request's TBT, the mean of its longest tenth of gaps."""
    return seconds / max(1, output_tokens // 10)


def _next_leaver_s(plan: Plan) -> float:
    """Seconds between two requests leaving the decode batch: each stays for its expected output."""
    stay_s = plan.expected_output_tokens * plan.decode.tbt_s
    return max(MIN_RETRY_S, stay_s / max(1, plan.decode.batch - 1))


def _shrink_s(plan: Plan, tbt_s: float, costs: CostModel) -> float:
    """Seconds until the decode batch has shrunk enough for the request to meet its TBT."""
    batch, context = plan.decode.batch, plan.decode.context_tokens
    mean_context = context / batch
    leavers = 0
    while leavers < batch - 1 and costs.decode_step_s(batch - leavers, int(context - leavers * mean_context)) > tbt_s:
        leavers += 1
    return max(MIN_RETRY_S, leavers * _next_leaver_s(plan))
