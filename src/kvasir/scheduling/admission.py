"""Early rejection: whether a request is worth starting, judged before any work is spent on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from kvasir.core.request import Slo
from kvasir.core.units import format_duration
from kvasir.costs.model import CostModel
from kvasir.report.slo import ScaledSlo, scaled_limit_s
from kvasir.scheduling.decode_choice import DecodeChoice
from kvasir.scheduling.plan import Plan, Refusal

MEMORY: Final = 1000
"""Requests over which means are taken."""

MIN_RETRY_S: Final = 0.1
"""Nobody is told to come back sooner; a client's round trip is about that long."""


class Admission(Protocol):
    """Says no by a Refusal, yes by None: when a request arrives and, if it `looks_again`, when its prefill is done."""

    @property
    def looks_again(self) -> bool: ...

    def judge(self, plan: Plan, costs: CostModel) -> Refusal | None: ...

    def at_hand_off(self, decode: DecodeChoice) -> Refusal | None: ...


class Once:
    """What is admitted stays admitted."""

    @property
    def looks_again(self) -> bool:
        return False

    def at_hand_off(self, decode: DecodeChoice) -> Refusal | None:
        return None


class Off(Once):
    """Everything is admitted."""

    def judge(self, plan: Plan, costs: CostModel) -> Refusal | None:
        return None


@dataclass(frozen=True, slots=True)
class SloAdmission(Once):
    """Reject what is predicted to miss its SLO on all that was assigned so far (Algorithm 1's last step)."""

    slo: Slo | ScaledSlo = field(default_factory=Slo)

    def judge(self, plan: Plan, costs: CostModel) -> Refusal | None:
        return late_first_token(plan, self.slo, costs) or slow_decode(plan, plan.decode, self.slo, costs)


@dataclass(frozen=True, slots=True)
class AtDecode:
    """The paper's baseline (arXiv 2407.00079, section 6): decode load is looked at when the prefill is already spent."""

    slo: Slo | ScaledSlo = field(default_factory=Slo)

    def judge(self, plan: Plan, costs: CostModel) -> Refusal | None:
        return late_first_token(plan, self.slo, costs)

    @property
    def looks_again(self) -> bool:
        return True

    def at_hand_off(self, decode: DecodeChoice) -> Refusal | None:
        if decode.tbt_s <= self.slo.tbt_s and decode.fits:
            return None
        message = (
            f"decode on {decode.instance} would have a TBT of {format_duration(decode.tbt_s)} in a batch of {decode.batch}"
        )
        return Refusal("slo_tbt" if decode.fits else "decode_full", message, MIN_RETRY_S)


@dataclass(frozen=True, slots=True)
class OnCurrentLoad(AtDecode):
    """The paper's early rejection: decode load is looked at before the prefill, as it is at that moment.

    It lags by the time of a prefill, which makes both pools' load swing; what slips through is refused at hand-off.
    """

    def judge(self, plan: Plan, costs: CostModel) -> Refusal | None:
        now = _with(plan, plan.outlook.batch_now, plan.outlook.context_now, costs)
        return late_first_token(plan, self.slo, costs) or slow_decode(plan, now, self.slo, costs)


@dataclass(frozen=True, slots=True)
class OnPredictedLoad(AtDecode):
    """The paper's early rejection based on prediction (section 6.4): decode load as it will be at hand-off time."""

    def judge(self, plan: Plan, costs: CostModel) -> Refusal | None:
        then = _with(plan, plan.outlook.batch_then, plan.outlook.context_then, costs)
        return late_first_token(plan, self.slo, costs) or slow_decode(plan, then, self.slo, costs)


RISE: Final = 0.02
FALL: Final = 0.004
"""By how much the limit comes down when somebody has to be refused for lateness, and goes up when not. Their ratio bounds the
share of those in an overload (a sixth); the rest is refused for being dear. Their size sets how fast it follows: the limit
halves within 34 refusals, and doubles within 170 admissions."""


class Predictive(Once):
    """Ours: on predicted load of both pools, and in an overload those go first who cost most for what they are worth.

    A request is worth one, plus its input tokens over their mean: an answer counts, and so does what it read. Dear is who
    takes more prefill seconds for that than `_limit_s`, which adapts: without lateness it grows without bound.
    """

    def __init__(self, slo: Slo | ScaledSlo):
        self.slo = slo
        self._limit_s = math.inf
        self._mean_tokens = 0.0
        self._dearest_s = 0.0
        self._num_seen = 0

    def judge(self, plan: Plan, costs: CostModel) -> Refusal | None:
        cost_s = self._cost_s(plan)
        refusal = late_first_token(plan, self.slo, costs) or self._crowding(plan)
        if refusal is not None:
            self._limit_s = min(self._limit_s, self._dearest_s) * (1.0 - RISE)
            return refusal
        self._limit_s *= 1.0 + FALL
        if cost_s > self._limit_s:
            message = f"the cluster is overloaded, and its prefill takes {format_duration(plan.candidate.prefill_s)}"
            return Refusal("overload", message, max(MIN_RETRY_S, plan.candidate.wait_s + plan.candidate.prefill_s))
        then = _with(plan, plan.outlook.batch_then, plan.outlook.context_then, costs)
        return slow_decode(plan, then, self.slo, costs)

    def _cost_s(self, plan: Plan) -> float:
        """Prefill seconds for each unit of worth."""
        tokens = plan.num_prompt_tokens
        self._num_seen = min(self._num_seen + 1, MEMORY)
        self._mean_tokens += (tokens - self._mean_tokens) / self._num_seen
        cost_s = plan.candidate.prefill_s * max(1, len(plan.candidate.group)) / (1.0 + tokens / self._mean_tokens)
        self._dearest_s = max(cost_s, self._dearest_s * (1.0 - 1.0 / MEMORY))
        return cost_s

    def _crowding(self, plan: Plan) -> Refusal | None:
        work_s = plan.candidate.prefill_s
        if work_s <= plan.spare_s:
            return None
        spare = format_duration(max(0.0, plan.spare_s))
        message = f"its prefill of {format_duration(work_s)} would make others late, which have {spare} to spare"
        return Refusal("slo_ttft", message, max(MIN_RETRY_S, work_s))


ADMISSIONS: dict[str, Callable[[Slo | ScaledSlo], Admission]] = {
    "off": lambda slo: Off(),
    "slo": SloAdmission,
    "at-decode": AtDecode,
    "current-load": OnCurrentLoad,
    "predicted-load": OnPredictedLoad,
    "predictive": Predictive,
}
"""Name on the command line → a new admission rule for these objectives."""


def ttft_limit_s(slo: Slo | ScaledSlo, num_prompt_tokens: int, costs: CostModel) -> float:
    """The TTFT that a prompt of this length may take."""
    if isinstance(slo, Slo):
        return slo.ttft_s
    return scaled_limit_s(costs.prefill_s(num_prompt_tokens, 0), slo)


def late_first_token(plan: Plan, slo: Slo | ScaledSlo, costs: CostModel) -> Refusal | None:
    limit_s = ttft_limit_s(slo, plan.num_prompt_tokens, costs)
    if plan.ttft_s <= limit_s:
        return None
    message = f"predicted TTFT {format_duration(plan.ttft_s)} exceeds the SLO of {format_duration(limit_s)}"
    drain_s = min(plan.ttft_s - limit_s, plan.candidate.wait_s)  # a queue drains a second per second
    return Refusal("slo_ttft", message, max(MIN_RETRY_S, drain_s))


def slow_decode(plan: Plan, decode: DecodeChoice, slo: Slo | ScaledSlo, costs: CostModel) -> Refusal | None:
    """Whether the batch that it joins steps too slowly, or has no room for so long that its TBT is missed."""
    if decode.tbt_s > slo.tbt_s:
        message = f"predicted TBT {format_duration(decode.tbt_s)} exceeds the SLO of {format_duration(slo.tbt_s)}"
        return Refusal("slo_tbt", message, _shrink_s(plan, decode, slo.tbt_s, costs))
    room_s = decode.ahead * _next_leaver_s(plan, decode)
    if decode.tbt_s + _as_gap(room_s, plan.expected_output_tokens) > slo.tbt_s:
        full = f"{decode.instance} has no room for another request before {format_duration(room_s)} have passed"
        return Refusal("decode_full", f"{full}, which would miss the TBT of {format_duration(slo.tbt_s)}", room_s)
    return None


def _with(plan: Plan, others: int, context_tokens: int, costs: CostModel) -> DecodeChoice:
    """The decode choice as if its instance had so many others in its batch; room is judged by the batch alone."""
    batch, context = others + 1, context_tokens + plan.num_prompt_tokens
    decode = plan.decode
    overflow = max(0, decode.ahead - max(0, decode.batch - batch))
    return DecodeChoice(decode.instance, costs.decode_step_s(batch, context), batch, context, overflow == 0, overflow)


def _as_gap(seconds: float, output_tokens: int) -> float:
    """What one gap of this length adds to a request's TBT, the mean of its longest tenth of gaps."""
    return seconds / max(1, output_tokens // 10)


def _next_leaver_s(plan: Plan, decode: DecodeChoice) -> float:
    """Seconds between two requests leaving the decode batch: each stays for its expected output."""
    stay_s = plan.expected_output_tokens * decode.tbt_s
    return max(MIN_RETRY_S, stay_s / max(1, decode.batch - 1))


def _shrink_s(plan: Plan, decode: DecodeChoice, tbt_s: float, costs: CostModel) -> float:
    """Seconds until the decode batch has shrunk enough for the request to meet its TBT."""
    batch, context = decode.batch, decode.context_tokens
    mean_context = context / batch
    leavers = 0
    while leavers < batch - 1 and costs.decode_step_s(batch - leavers, int(context - leavers * mean_context)) > tbt_s:
        leavers += 1
    return max(MIN_RETRY_S, leavers * _next_leaver_s(plan, decode))
