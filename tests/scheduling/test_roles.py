"""Roles that follow the load."""

import math
from collections.abc import Callable

import pytest

from kvasir.core.commands import SetRole
from kvasir.core.events import InstanceInfo
from kvasir.core.request import Role
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.costs.model import CostModel
from kvasir.scheduling.fleet import Fleet
from kvasir.scheduling.instance import Seat
from kvasir.scheduling.roles import HOLD_S, Elastic

COSTS = FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 0.0, 1e-6), 0.0, 1e6)  # a step takes 10 ms + 1 us a token
DEAR = FittedCost(PrefillFit(0.050, 1e-3, 0, 0), DecodeFit(0.010, 0.0, 1e-6), 0.0, 1e6)  # a chunk beside decode is not worth it
STEP_S, TBT_S = 0.06, 0.1


def transfer_s(tokens: int) -> float:
    return tokens * 1e-4


def fleet(*roles: Role) -> Fleet:
    made = Fleet(COSTS, STEP_S)
    for index, role in enumerate(roles):
        made.join(InstanceInfo(f"i{index}", role, f"n{index}", 1, 10_000, 8))
    return made


def seat(kv_tokens: int = 1000, context_tokens: int = 1000) -> Seat:
    return Seat(context_tokens, kv_tokens, joins_s=0.0, stays_s=10.0)


def sit(cluster: Fleet, instance: str, count: int, kv_tokens: int = 1000) -> None:
    for index in range(count):
        cluster.sit(instance, f"{instance}-{index}", seat(kv_tokens), 0.0)
        cluster.take_seat(instance, f"{instance}-{index}", 0.0)


def elastic(costs: CostModel = COSTS, transfer: Callable[[int], float] = transfer_s) -> Elastic:
    return Elastic(costs, TBT_S, STEP_S, transfer)


def settle(cluster: Fleet, roles: Elastic, now: float, seconds: float) -> list[SetRole]:
    """Ticks for so long; the last changes, applied."""
    last: list[SetRole] = []
    for tick in range(int(seconds) + 1):
        if changes := roles.review(cluster, now + tick):
            apply(cluster, changes)
            last = changes
    return last


def prefill_everywhere(cluster: Fleet, seconds: float = 1000.0) -> None:
    """All that may prefill have to."""
    for instance in cluster.prefillers:
        name = instance.info.id
        cluster.sent(name, f"p-{name}", seconds=seconds, tokens=1000, now=0.0, rank=0.0, due_s=math.inf)


def roles_of(cluster: Fleet) -> str:
    return "".join(i.info.role.value[0] for i in cluster.instances)


def apply(cluster: Fleet, changes: list[SetRole]) -> None:
    for change in changes:
        info = cluster[change.instance].info
        cluster.update(InstanceInfo(info.id, change.role, info.node, info.epoch, info.kv_tokens, info.max_batch))


def test_what_decoding_needs_beyond_one_instance_is_opened_at_once_where_least_is_to_prefill() -> None:
    cluster = fleet(Role.DECODE, Role.PREFILL, Role.PREFILL)
    prefill_everywhere(cluster)
    cluster.sent("i1", "r", seconds=5.0, tokens=5000, now=0.0, rank=0.0, due_s=30.0)
    sit(cluster, "i0", 8, kv_tokens=1300)  # 1.04 times what it holds
    changes = elastic().review(cluster, 0.0)
    assert [c.instance for c in changes if c.role is not Role.PREFILL] == ["i2"]


def test_as_many_change_as_are_needed() -> None:
    cluster = fleet(Role.DECODE, *[Role.PREFILL] * 4)
    prefill_everywhere(cluster)
    sit(cluster, "i0", 8, kv_tokens=2500)  # 2 instances' KV in steps of 18 ms; spread over two, steps are 13 ms
    changes = elastic(DEAR).review(cluster, 0.0)
    apply(cluster, changes)
    assert roles_of(cluster) == "ddppp"


def test_an_instance_is_mixed_while_the_slack_of_its_steps_is_worth_more_than_an_instance_that_only_prefills() -> None:
    """One that only decodes costs a whole instance; a mixed one the fixed part of its steps and what it decodes."""
    cluster = fleet(Role.MIXED, Role.PREFILL)
    prefill_everywhere(cluster)
    sit(cluster, "i0", 4, kv_tokens=2000)  # 0.8 of its memory, in steps of 60 ms
    assert elastic().review(cluster, 0.0) == []


def test_an_instance_only_decodes_when_mixed_steps_would_fill_the_memory_of_two() -> None:
    """Answers stay as long as their steps take: 1.2 times the memory in steps of 60 ms is 0.3 of it in steps of 14 ms."""
    cluster = fleet(Role.MIXED, Role.PREFILL, Role.PREFILL)
    prefill_everywhere(cluster)
    sit(cluster, "i0", 8, kv_tokens=1500)
    assert elastic(DEAR).review(cluster, 0.0) == [SetRole("i0", Role.DECODE)]


def test_others_go_back_when_they_were_not_needed_for_a_while_and_not_before() -> None:
    cluster = fleet(Role.DECODE, Role.DECODE, Role.PREFILL)
    prefill_everywhere(cluster)
    sit(cluster, "i0", 7, kv_tokens=1300)
    sit(cluster, "i1", 6, kv_tokens=1300)
    roles = elastic(DEAR)
    assert roles.review(cluster, 0.0) == []  # both are needed
    for index in range(6):
        cluster.leave("i1", f"i1-{index}", 0.0)
    for index in range(3, 7):
        cluster.leave("i0", f"i0-{index}", 0.0)
    assert roles.review(cluster, 0.0) == []
    assert roles.review(cluster, HOLD_S - 1.0) == []
    assert [c.instance for c in roles.review(cluster, HOLD_S) if c.role is Role.PREFILL] == ["i1"]


def test_a_peak_starts_the_wait_again() -> None:
    cluster = fleet(Role.DECODE, Role.DECODE, Role.PREFILL)
    prefill_everywhere(cluster)
    roles = elastic(DEAR)
    sit(cluster, "i0", 3)
    assert roles.review(cluster, 1.0) == []
    sit(cluster, "i1", 8, kv_tokens=1200)
    assert roles.review(cluster, 10.5) == []  # now both are needed
    for index in range(8):
        cluster.leave("i1", f"i1-{index}", 11.0)
    assert roles.review(cluster, 12.0) == []
    assert roles.review(cluster, 11.9 + HOLD_S) == []
    assert roles.review(cluster, 12.0 + HOLD_S)


def test_one_always_decodes_and_takes_prefill_too() -> None:
    cluster = fleet(Role.DECODE, Role.PREFILL)
    prefill_everywhere(cluster)
    roles = elastic()
    changes = roles.review(cluster, 0.0)
    assert changes == [SetRole("i0", Role.MIXED)]
    apply(cluster, changes)
    assert settle(cluster, roles, 1.0, 100.0) == []


def test_half_of_those_with_nothing_to_prefill_are_mixed_when_that_was_so_for_a_while() -> None:
    cluster = fleet(Role.MIXED, *[Role.PREFILL] * 8)
    roles = elastic()
    sit(cluster, "i0", 1)
    assert settle(cluster, roles, 1000.0, 1.0) == []  # a cluster that starts is about to be busy
    settle(cluster, roles, 1002.0, 100.0)
    assert roles_of(cluster) == "mmmmppppp"
    prefill_everywhere(cluster)
    settle(cluster, roles, 1103.0, 40.0)
    assert roles_of(cluster) == "mpppppppp"


def test_of_two_ways_that_leave_as_much_for_prefill_instances_only_decode() -> None:
    """A mixed one without slack is only slower."""
    cluster = fleet(Role.MIXED, Role.PREFILL, Role.PREFILL)
    prefill_everywhere(cluster)
    sit(cluster, "i0", 8)
    assert elastic(DEAR).review(cluster, 0.0) == [SetRole("i0", Role.DECODE)]


def test_when_nothing_is_enough_as_many_decode_as_can_and_one_prefills() -> None:
    cluster = fleet(Role.DECODE, Role.PREFILL, Role.PREFILL)
    prefill_everywhere(cluster)
    sit(cluster, "i0", 8, kv_tokens=100_000)
    apply(cluster, elastic().review(cluster, 0.0))
    assert roles_of(cluster) == "ddm"


@pytest.mark.parametrize(("count", "expected"), [(2, "dp"), (12, "dm")])
def test_a_small_shortage_is_borne_where_another_would_cost_more_than_it_saves(count: int, expected: str) -> None:
    """8 answers of 1,110 tokens fill 0.89 of an instance: 4 % too much. A mixed one costs half of all prefill, or a twelfth."""
    cluster = fleet(Role.DECODE, *[Role.PREFILL] * count)
    roles = elastic(DEAR)
    prefill_everywhere(cluster)
    sit(cluster, "i0", 6, kv_tokens=1110)
    assert settle(cluster, roles, 0.0, 60.0) == []  # long enough to be seen as busy
    for index in range(2):
        cluster.sit("i0", f"more-{index}", seat(1110), 60.0)
    apply(cluster, roles.review(cluster, 61.0))
    assert roles_of(cluster)[:2] == expected


def test_an_answer_stays_as_long_as_steps_take_where_it_is() -> None:
    cluster = fleet(Role.DECODE, Role.MIXED)
    cluster.answer_tokens, cluster.ttft_s = 100.0, 6.0
    for name in ("i0", "i1"):
        sit(cluster, name, 2)
        for index in range(6):
            cluster.sit(name, f"{name}-later-{index}", seat(), 0.0)
    assert cluster.stays_s(cluster["i1"]) == pytest.approx(1.13, abs=0.01)  # steps of 11 ms, for 1.3 decode at a time
    prefill_everywhere(cluster)
    assert cluster.stays_s(cluster["i1"]) == pytest.approx(6.0)  # steps of 60 ms
    assert cluster.expected(cluster["i1"], cluster.stays_s(cluster["i1"])).batch == 4  # as long as it waits for its first token
    assert cluster.expected(cluster["i0"], cluster.stays_s(cluster["i0"])).batch == 1
    assert cluster.decode_columns(frozenset()).stays_s.tolist() == [cluster.stays_s(i) for i in cluster.instances]


def test_prefill_beside_decode_is_predicted_in_the_slack_of_its_steps() -> None:
    cluster = fleet(Role.MIXED)
    cluster.ttft_s, cluster.answer_tokens = 1e9, 1.0  # only who decodes now counts
    cluster.sent("i0", "r", seconds=1.0, tokens=1000, now=0.0, rank=0.0, due_s=30.0)
    assert cluster["i0"].book.wait_s(0.0) == 1.0
    cluster.sit("i0", "d", seat(context_tokens=35_000), 0.0)
    assert cluster["i0"].book.wait_s(0.0) == 1.0  # it is still in prefill elsewhere
    cluster.take_seat("i0", "d", 0.0)  # steps of 45 ms and a chunk's own overhead of 1 ms leave 14 ms of 60
    assert cluster["i0"].book.wait_s(0.0) == pytest.approx(60 / 14)
    cluster.check()


def test_requests_still_in_prefill_count_with_the_share_of_time_that_they_will_decode() -> None:
    cluster = fleet(Role.DECODE, Role.PREFILL, Role.PREFILL)
    prefill_everywhere(cluster)
    for index in range(10):
        cluster.sit("i0", f"r{index}", seat(), 0.0)  # 10 would be more than 8 seats hold
    cluster.answer_tokens, cluster.ttft_s = 100.0, 1.5  # as long as 100 steps of 15 ms, in which 5 decode
    assert cluster.expected(cluster["i0"], cluster.stays_s(cluster["i0"])).batch == 5
    assert elastic().review(cluster, 0.0) == []
    cluster.ttft_s = 0.1
    assert elastic().review(cluster, 0.0) != []


def test_a_cluster_that_starts_with_too_many_to_decode_gives_them_back_at_once() -> None:
    cluster = fleet(Role.PREFILL, *[Role.DECODE] * 6)
    apply(cluster, elastic().review(cluster, 0.0))
    assert roles_of(cluster) == "pmppppp"


def test_another_decodes_when_incoming_kv_would_fill_the_network_of_one() -> None:
    cluster = fleet(Role.MIXED, Role.PREFILL, Role.PREFILL)
    prefill_everywhere(cluster)
    sit(cluster, "i0", 2)  # 2,000 tokens: 0.2 s of network
    cluster.answer_tokens = 16.0  # in steps of 60 ms
    assert elastic().review(cluster, 0.0) == []
    cluster.answer_tokens = 3.8
    changes = elastic().review(cluster, 0.0)
    assert [c.instance for c in changes if c.role is not Role.PREFILL] == ["i1"]
