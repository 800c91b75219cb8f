"""Early rejection, rule by rule, on plans small enough to work out by hand."""

import math

import pytest

from kvasir.core.commands import Candidate
from kvasir.core.request import Request, Slo
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.scheduling.admission import ADMISSIONS, Predictive
from kvasir.scheduling.decode_choice import DecodeChoice
from kvasir.scheduling.plan import Outlook, Plan

COSTS = FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 0.010, 0.0), 0.0, 1e6)  # 10 ms + 10 ms a sequence
SLO = Slo(ttft_s=2.0, tbt_s=0.1)  # nine sequences a batch at most


def plan(
    *,
    tokens: int = 1000,
    prefill_s: float = 1.0,
    wait_s: float = 0.0,
    assigned: int = 1,
    now: int = 1,
    then: int = 1,
    spare_s: float = math.inf,
    ahead: int = 0,
) -> Plan:
    """Batches with the request in them: as assigned so far, as it is now, as it will be."""
    return Plan(
        request=Request("r", tokens, 100, (), 0.0),
        candidate=Candidate("p", wait_s, 0.0, prefill_s, 0),
        decode=DecodeChoice("d", COSTS.decode_step_s(assigned, 0), assigned, 1000, ahead == 0, ahead),
        ttft_s=wait_s + prefill_s,
        expected_output_tokens=100,
        spare_s=spare_s,
        outlook=Outlook(now - 1, 0, then - 1, 0),
    )


def code(rule: str, judged: Plan) -> str | None:
    refusal = ADMISSIONS[rule](SLO).judge(judged, COSTS)
    return refusal.code if refusal else None


@pytest.mark.parametrize("rule", sorted(ADMISSIONS.keys() - {"off"}))
def test_every_rule_refuses_a_first_token_that_is_predicted_late(rule: str) -> None:
    assert code(rule, plan(wait_s=1.0)) is None
    assert code(rule, plan(wait_s=1.1)) == "slo_ttft"


@pytest.mark.parametrize(
    ("rule", "assigned", "now", "then", "is_refused"),
    [
        ("off", 20, 20, 20, False),
        ("slo", 10, 1, 1, True),
        ("slo", 9, 20, 20, False),
        ("at-decode", 20, 20, 20, False),
        ("current-load", 20, 9, 20, False),
        ("current-load", 1, 10, 1, True),
        ("predicted-load", 20, 20, 9, False),
        ("predicted-load", 1, 1, 10, True),
        ("predictive", 20, 20, 9, False),
        ("predictive", 1, 1, 10, True),
    ],
)
def test_each_rule_looks_at_its_own_load_of_decode(rule: str, assigned: int, now: int, then: int, is_refused: bool) -> None:
    assert (code(rule, plan(assigned=assigned, now=now, then=then)) == "slo_tbt") is is_refused


def test_ours_refuses_who_would_make_others_late() -> None:
    assert code("predictive", plan(spare_s=1.0)) is None
    assert code("predictive", plan(spare_s=0.9)) == "slo_ttft"
    assert code("slo", plan(spare_s=0.9)) is None


@pytest.mark.parametrize("rule", ["at-decode", "current-load", "predicted-load"])
def test_the_papers_rules_look_again_when_the_prefill_is_spent(rule: str) -> None:
    admission = ADMISSIONS[rule](SLO)
    assert admission.looks_again
    assert admission.at_hand_off(DecodeChoice("d", 0.1, 9, 9000, True, 0)) is None
    late = admission.at_hand_off(DecodeChoice("d", 0.11, 10, 10_000, True, 0))
    full = admission.at_hand_off(DecodeChoice("d", 0.05, 4, 4000, False, 1))
    assert late is not None
    assert late.code == "slo_tbt"
    assert full is not None
    assert full.code == "decode_full"


def test_others_decide_once() -> None:
    assert [rule for rule, make in sorted(ADMISSIONS.items()) if not make(SLO).looks_again] == ["off", "predictive", "slo"]


def test_a_batch_that_will_have_room_by_then_is_no_reason_to_refuse() -> None:
    assert code("predictive", plan(assigned=3, then=2, ahead=1)) is None
    assert code("predictive", plan(assigned=3, then=3, ahead=3)) == "decode_full"


def judge(rule: Predictive, *, tokens: int = 1000, prefill_s: float = 1.0, wait_s: float = 0.0) -> str | None:
    refusal = rule.judge(plan(tokens=tokens, prefill_s=prefill_s, wait_s=wait_s), COSTS)
    return refusal.code if refusal else None


def test_in_an_overload_those_who_cost_most_for_what_they_are_worth_go_first() -> None:
    rule = Predictive(SLO)
    for _ in range(20):
        assert judge(rule, prefill_s=0.2) is None
        assert judge(rule, tokens=4000, prefill_s=1.9) is None
    for _ in range(10):
        assert judge(rule, prefill_s=0.2, wait_s=3.0) == "slo_ttft"
    assert judge(rule, tokens=4000, prefill_s=1.9) == "overload"
    assert judge(rule, tokens=4000, prefill_s=0.2) is None  # as long, but cached
    assert judge(rule, prefill_s=0.2) is None


def test_the_price_falls_when_nobody_has_to_be_refused() -> None:
    rule = Predictive(SLO)
    for _ in range(10):
        judge(rule, tokens=4000, prefill_s=1.9)
        judge(rule, tokens=4000, prefill_s=1.9, wait_s=3.0)
    assert judge(rule, tokens=4000, prefill_s=1.9) == "overload"
    for _ in range(200):
        assert judge(rule, prefill_s=0.1) is None
    assert judge(rule, tokens=4000, prefill_s=1.9) is None


def test_without_lateness_nothing_is_too_dear() -> None:
    rule = Predictive(SLO)
    assert all(judge(rule, prefill_s=0.1 + 0.19 * (index % 10)) is None for index in range(500))
