"""Roles that follow the load."""

import pytest

from kvasir.core.commands import SetRole
from kvasir.core.events import InstanceInfo
from kvasir.core.request import Role
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.scheduling.fleet import Fleet, Seat
from kvasir.scheduling.roles import HOLD_S, Elastic

COSTS = FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 0.0, 1e-6), 0.0, 1e6)
STEP_S = 0.09


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


def apply(cluster: Fleet, changes: list[SetRole]) -> None:
    for change in changes:
        info = cluster[change.instance].info
        cluster.update(InstanceInfo(info.id, change.role, info.node, info.epoch, info.kv_tokens, info.max_batch))


def test_a_full_decode_instance_gets_help_from_the_one_with_the_least_to_prefill() -> None:
    cluster = fleet(Role.MIXED, Role.PREFILL, Role.PREFILL)
    cluster.sent("i1", "r", seconds=5.0, tokens=5000, now=0.0, rank=0.0, due_s=30.0)
    sit(cluster, "i0", 8)  # 8 of 8 seats
    assert Elastic(COSTS, STEP_S, transfer_s).review(cluster, 0.0) == [SetRole("i2", Role.MIXED)]


def test_as_many_change_as_are_needed() -> None:
    cluster = fleet(Role.MIXED, Role.PREFILL, Role.PREFILL, Role.PREFILL)
    sit(cluster, "i0", 8, kv_tokens=3000)  # 2.4 instances' KV
    assert [c.instance for c in Elastic(COSTS, STEP_S, transfer_s).review(cluster, 0.0)] == ["i1", "i2"]


def test_one_goes_back_when_it_was_not_needed_for_a_while_and_not_before() -> None:
    cluster = fleet(Role.MIXED, Role.MIXED, Role.PREFILL)
    sit(cluster, "i0", 8)
    roles = Elastic(COSTS, STEP_S, transfer_s)
    assert roles.review(cluster, 0.0) == []  # both are needed
    for index in range(2, 8):
        cluster.leave("i0", f"i0-{index}", 0.0)
    assert roles.review(cluster, 0.0) == []
    assert roles.review(cluster, HOLD_S - 1.0) == []
    assert roles.review(cluster, HOLD_S) == [SetRole("i1", Role.PREFILL)]


def test_a_peak_starts_the_wait_again() -> None:
    cluster = fleet(Role.MIXED, Role.MIXED)
    roles = Elastic(COSTS, STEP_S, transfer_s)
    sit(cluster, "i0", 8)
    sit(cluster, "i1", 4)
    assert roles.review(cluster, 10.0) == []
    for index in range(4):
        cluster.leave("i1", f"i1-{index}", 11.0)
    for index in range(8):
        cluster.leave("i0", f"i0-{index}", 11.0)
    assert roles.review(cluster, 12.0) == []
    assert roles.review(cluster, 12.0 + HOLD_S) == [SetRole("i0", Role.PREFILL)]


def test_one_always_decodes_and_takes_prefill_too() -> None:
    cluster = fleet(Role.DECODE, Role.PREFILL)
    roles = Elastic(COSTS, STEP_S, transfer_s)
    changes = roles.review(cluster, 0.0)
    assert changes == [SetRole("i0", Role.MIXED)]
    apply(cluster, changes)
    assert roles.review(cluster, 1000.0) == []


def test_prefill_beside_decode_is_predicted_in_the_slack_of_its_steps() -> None:
    cluster = fleet(Role.MIXED)
    cluster.decode_share = 0.0  # only who decodes now counts
    cluster.sent("i0", "r", seconds=1.0, tokens=1000, now=0.0, rank=0.0, due_s=30.0)
    assert cluster["i0"].book.wait_s(0.0) == 1.0
    cluster.sit("i0", "d", seat(context_tokens=35_000), 0.0)
    assert cluster["i0"].book.wait_s(0.0) == 1.0  # it is still in prefill elsewhere
    cluster.take_seat("i0", "d", 0.0)  # steps of 45 ms and a chunk's own overhead of 1 ms leave 44 ms of 90
    assert cluster["i0"].book.wait_s(0.0) == pytest.approx(90 / 44)
    cluster.check()


def test_requests_still_in_prefill_count_with_the_share_of_time_that_they_will_decode() -> None:
    cluster = fleet(Role.MIXED, Role.PREFILL)
    for index in range(10):
        cluster.sit("i0", f"r{index}", seat(), 0.0)  # 10 would be more than 8 seats hold
    cluster.decode_share = 0.5
    assert cluster.expected(cluster["i0"]).batch == 5
    assert Elastic(COSTS, STEP_S, transfer_s).review(cluster, 0.0) == []
    cluster.decode_share = 0.9
    assert Elastic(COSTS, STEP_S, transfer_s).review(cluster, 0.0) == [SetRole("i1", Role.MIXED)]


def test_a_cluster_that_starts_with_too_many_to_decode_gives_half_of_them_back_at_once() -> None:
    cluster = fleet(Role.PREFILL, *[Role.DECODE] * 6)
    changes = Elastic(COSTS, STEP_S, transfer_s).review(cluster, 0.0)
    assert changes == [SetRole(f"i{index}", Role.PREFILL) for index in (1, 2, 3)]


def test_another_decodes_when_incoming_kv_would_fill_the_network_of_one() -> None:
    cluster = fleet(Role.MIXED, Role.PREFILL)
    sit(cluster, "i0", 2)  # 2,000 tokens: 0.2 s of network
    cluster.stays_s = 1.0
    assert Elastic(COSTS, STEP_S, transfer_s).review(cluster, 0.0) == []  # 0.2 of 0.35
    cluster.stays_s = 0.5
    assert Elastic(COSTS, STEP_S, transfer_s).review(cluster, 0.0) == [SetRole("i1", Role.MIXED)]
