"""What an operator asks reaches every pool, also those that come later; decisions are remembered up to a bound."""

from __future__ import annotations

from typing import Any

import pytest

from kvasir.cluster import operator as operator_module
from kvasir.cluster.hub import Hub
from kvasir.cluster.messages import HelloPool
from kvasir.cluster.operator import Operator
from kvasir.cluster.orders import ClearCache, PinBlocks, SetTenantQuota, UnpinBlocks
from kvasir.core.commands import Decision
from kvasir.core.errors import ClusterError, RequestError
from kvasir.core.keys import block_keys
from tests.cluster.harness import BLOCK, SPEC, default_brains

PROMPT = list(range(1, 3 * BLOCK + 5))


class World:
    """A hub with two pools that hear, and a clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.told: list[tuple[str, Any]] = []
        self.deaf: set[str] = set()
        conductor = default_brains(64, "mooncake", 64, 16).conductor
        self.hub = Hub(SPEC, conductor, send=self._tell, clock=lambda: self.now, request_timeout_s=10.0)
        self.operator = Operator(self.hub, self._tell, lambda: self.now)
        for node in ("node0", "node1"):
            self.hub.take(f"pool@{node}", HelloPool(node, 64))
        self.told.clear()

    def _tell(self, peer: str, message: Any) -> bool:
        if peer in self.deaf:
            return False
        self.told.append((peer, message))
        return True

    def orders(self) -> list[tuple[str, Any]]:
        told, self.told = self.told, []
        return told

    def pin(self, prompt: list[int] = PROMPT, *, salt: str = "", ttl_s: float = 60.0, priority: int = 1) -> str:
        return self.operator.pin(prompt, salt=salt, tenant="", ttl_s=ttl_s, priority=priority).id


def keys_of(prompt: list[int], salt: str = "") -> tuple[bytes, ...]:
    return tuple(block_keys(SPEC.root_key(salt), prompt, BLOCK))


def test_every_pool_is_told_to_clear() -> None:
    world = World()
    assert world.operator.clear_cache() == ["node0", "node1"]
    assert world.orders() == [("pool@node0", ClearCache()), ("pool@node1", ClearCache())]


def test_a_pin_names_the_full_blocks_under_the_salt() -> None:
    world = World()
    world.pin(salt="s", ttl_s=30.0, priority=2)
    order = PinBlocks(keys_of(PROMPT, "s"), 30.0, 2)
    assert world.orders() == [("pool@node0", order), ("pool@node1", order)]
    (status,) = world.operator.pins()
    assert (status.num_tokens, status.num_blocks, status.ttl_s) == (len(PROMPT), 3, 30.0)


def test_less_than_a_block_is_nothing_to_pin() -> None:
    world = World()
    with pytest.raises(RequestError, match="nothing to pin"):
        world.pin([1, 2, 3])
    assert world.orders() == []


def test_a_pool_that_comes_later_hears_what_still_holds() -> None:
    world = World()
    world.pin(ttl_s=50.0)
    world.pin(PROMPT[:BLOCK], ttl_s=5.0)
    world.operator.set_quota("a", 10)
    world.operator.set_quota("b", 10)
    world.operator.set_quota("b", None)
    world.orders()
    world.now += 20.0
    world.hub.take("pool@node2", HelloPool("node2", 64))
    assert world.orders() == [("pool@node2", PinBlocks(keys_of(PROMPT), 30.0, 1)), ("pool@node2", SetTenantQuota("a", 10))]


def test_unpinning_leaves_what_another_pin_holds() -> None:
    world = World()
    long = world.pin()
    world.pin(PROMPT[: 2 * BLOCK], priority=5)
    world.pin([7] * BLOCK)
    world.orders()
    world.operator.unpin(long)
    told = [order for peer, order in world.orders() if peer == "pool@node0"]
    assert told == [UnpinBlocks(keys_of(PROMPT)), PinBlocks(keys_of(PROMPT[: 2 * BLOCK]), 60.0, 5)]
    with pytest.raises(RequestError, match="no such pin"):
        world.operator.unpin(long)


def test_pins_expire_and_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_module, "MAX_PINS", 2)
    world = World()
    world.pin(ttl_s=10.0)
    world.pin(ttl_s=90.0)
    with pytest.raises(RequestError, match="delete one"):
        world.pin()
    world.now += 11.0
    world.pin()
    assert len(world.operator.pins()) == 2


def test_a_pool_that_cannot_be_reached_is_an_error_and_no_pin() -> None:
    world = World()
    world.deaf = {"pool@node1"}
    with pytest.raises(ClusterError, match="cannot reach the pool of node1"):
        world.pin()
    assert world.operator.pins() == []


def test_decisions_come_newest_first_and_are_bounded() -> None:
    world = World()
    for number in range(operator_module.MAX_DECISIONS + 5):
        world.hub.on_decision(Decision(f"r{number}", "mooncake", float(number)))
    assert [timed.decision.request_id for timed in world.operator.decisions(2)] == ["r1004", "r1003"]
    assert len(world.operator.decisions(10**6)) == operator_module.MAX_DECISIONS
    assert world.operator.decisions(1)[0].age_s == 100.0 - 1004
