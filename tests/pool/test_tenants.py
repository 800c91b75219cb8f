"""Quotas: one rule at a time, and a property over random work of several tenants."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.core.keys import BlockKey, block_keys, root_key
from kvasir.core.pool_events import (
    KeyedSlot,
    LeaseBlocks,
    Leased,
    OwnerJoined,
    PoolAnswer,
    PoolEvent,
    PutEnd,
    PutStart,
    ReleaseLease,
    Removed,
    Reserved,
    SetQuota,
    Stored,
    TenantStats,
)
from kvasir.pool.node import PoolNode

NUM_SLOTS = 8


class Tenant:
    """Computes prompts in the name of one tenant, whose salt is in its keys."""

    def __init__(self, node: PoolNode, name: str):
        self.node, self.name = node, name
        self.root = root_key(model="m", dtype="f", layout="l", block_tokens=1, salt=name)
        self.tell(OwnerJoined("p", 1))

    def tell(self, event: PoolEvent) -> list[PoolAnswer]:
        return self.node.handle(event, 0.0)

    def keys(self, prompt: str) -> tuple[BlockKey, ...]:
        return tuple(block_keys(self.root, list(prompt.encode()), 1))

    def quota(self, slots: int | None) -> list[PoolAnswer]:
        return self.tell(SetQuota("p", 1, self.name, slots))

    def open(self, lease: str, prompt: str) -> tuple[int, list[PoolAnswer]]:
        """Lease what is here, compute and publish the rest as far as there is room: the hits, and all that was said."""
        keys = self.keys(prompt)
        (leased,) = self.tell(LeaseBlocks("p", 1, lease, keys, self.name))
        assert isinstance(leased, Leased)
        missing = keys[len(leased.slots) :]
        said = self.tell(PutStart("p", 1, len(missing), self.name))
        reserved = next(answer for answer in said if isinstance(answer, Reserved))
        blocks = tuple(map(KeyedSlot, missing, reserved.slots))
        return len(leased.slots), [*said, *self.tell(PutEnd("p", 1, lease, blocks))]

    def close(self, lease: str) -> list[PoolAnswer]:
        return self.tell(ReleaseLease("p", 1, lease))

    def published(self) -> int:
        return next((t.published for t in self.node.stats().tenants if t.tenant == self.name), 0)


@pytest.fixture
def node() -> Iterator[PoolNode]:
    node = PoolNode(NUM_SLOTS)
    yield node
    node.check()


def removed(answers: list[PoolAnswer]) -> list[tuple[str, tuple[BlockKey, ...]]]:
    return [(answer.reason, answer.keys) for answer in answers if isinstance(answer, Removed)]


def stored(answers: list[PoolAnswer]) -> tuple[BlockKey, ...]:
    return tuple(key for answer in answers if isinstance(answer, Stored) for key in answer.keys)


def test_at_its_quota_a_tenant_s_own_idle_blocks_make_room(node: PoolNode) -> None:
    a = Tenant(node, "a")
    a.quota(3)
    a.open("r", "abc")
    a.close("r")
    _, said = a.open("r", "xy")
    assert [key for _, keys in removed(said) for key in keys] == [*a.keys("abc")[:0:-1]]
    assert {reason for reason, _ in removed(said)} == {"quota"}
    assert stored(said) == a.keys("xy")
    assert node.stats().tenants == (TenantStats("a", 3, 3),)
    assert node.stats().quota_evictions == 2


def test_without_idle_blocks_of_its_own_the_rest_of_its_sequence_stays_private(node: PoolNode) -> None:
    a = Tenant(node, "a")
    a.quota(2)
    _, said = a.open("r", "abcd")
    assert stored(said) == a.keys("ab")
    stats = node.stats()
    assert (stats.private, stats.over_quota, stats.published) == (2, 2, 2)
    a.close("r")
    assert node.stats().free == NUM_SLOTS - 2


def test_others_blocks_are_not_evicted_for_a_tenant_at_its_quota(node: PoolNode) -> None:
    a, b = Tenant(node, "a"), Tenant(node, "b")
    b.open("r", "abcdef")
    b.close("r")
    a.quota(2)
    a.open("r1", "ab")
    _, said = a.open("r2", "uvw")
    assert removed(said) == []
    assert b.published() == 6
    _, said = b.open("r3", "uv")
    assert removed(said) == [("evicted", b.keys("abcdef")[:3:-1])], "who has no quota takes from all"


def test_under_its_quota_a_tenant_takes_from_others_what_it_may_still_publish(node: PoolNode) -> None:
    a, b = Tenant(node, "a"), Tenant(node, "b")
    b.open("r", "abcdefgh")
    b.close("r")
    a.quota(3)
    _, said = a.open("r", "abcde")
    assert [len(keys) for _, keys in removed(said)] == [3]
    assert stored(said) == a.keys("abc")


def test_a_lowered_quota_takes_what_is_idle_at_once_and_the_rest_when_it_is_released(node: PoolNode) -> None:
    a = Tenant(node, "a")
    a.open("r", "abcd")
    a.open("s", "xy")
    a.close("s")
    assert removed(a.quota(3)) == [("quota", a.keys("xy")[::-1])]
    assert a.published() == 4
    assert removed(a.close("r")) == [("quota", a.keys("abcd")[3:])]
    assert removed(a.quota(None)) == []
    assert a.published() == 3


def test_what_was_there_before_the_first_tenant_came_counts_for_nobody(node: PoolNode) -> None:
    anyone, a = Tenant(node, ""), Tenant(node, "a")
    anyone.open("r", "abc")
    a.open("s", "ab")
    assert node.stats().tenants == (TenantStats("", 3, None), TenantStats("a", 2, None))
    anyone.close("r")
    assert removed(anyone.quota(1)) == [("quota", anyone.keys("abc")[:0:-1])]


TENANTS = st.sampled_from(["a", "b", "c"])
PROMPTS = st.sampled_from(["pqrs", "pqxy", "puvw", "mnop", "pq"])
STEPS = st.lists(
    st.tuples(st.sampled_from(["open", "open", "close", "quota"]), TENANTS, PROMPTS, st.integers(0, 4)), max_size=40
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_tenants_hit_only_their_own_and_have_no_more_than_their_quota(steps: list[tuple[str, str, str, int]]) -> None:
    node = PoolNode(NUM_SLOTS)
    tenants = {name: Tenant(node, name) for name in "abc"}
    quotas: dict[str, int] = {}
    leases: dict[str, str] = {}
    seen: dict[BlockKey, str] = {}
    for kind, name, prompt, number in steps:
        tenant, others = tenants[name], [t for t in tenants.values() if t.name != name]
        before = {other.name: other.published() for other in others}
        had, lease = tenant.published(), f"r{number}"
        said: list[PoolAnswer] = []
        if kind == "quota":
            said = tenant.quota(number)
            quotas[name] = number
        elif kind == "open" and lease not in leases:
            expected = [key for key in tenant.keys(prompt) if key in node.inventory()]
            hits, said = tenant.open(lease, prompt)
            assert hits == len(expected)
            leases[lease] = name
            for key in stored(said):
                assert seen.setdefault(key, name) == name, "a block of another tenant"
        elif kind == "close" and lease in leases:
            tenants[leases.pop(lease)].close(lease)
        node.check()
        if had >= quotas.get(name, NUM_SLOTS + 1) and kind == "open":
            assert before == {other.name: other.published() for other in others}, "taken from others at its quota"
        for other_name, quota in quotas.items():
            if tenants[other_name].published() > quota:
                assert other_name in leases.values(), "more than its quota and nobody leases it"
                assert kind != "open" or tenants[other_name].published() <= (had if other_name == name else before[other_name])
    for lease, name in leases.items():
        tenants[name].close(lease)
    assert all(tenants[name].published() <= quota for name, quota in quotas.items())
    node.check()
