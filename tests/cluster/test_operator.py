"""What an operator asks reaches every pool, also those that come later; decisions are remembered up to a bound."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from kvasir.cluster import operator as operator_module
from kvasir.cluster.hub import Hub
from kvasir.cluster.messages import HelloPool, OrderDone
from kvasir.cluster.operator import Operator
from kvasir.cluster.orders import ClearCache, Order, PinBlocks, PinPriority, SetTenantQuota, UnpinBlocks
from kvasir.core.commands import Decision
from kvasir.core.errors import ClusterError, DeadlineExceeded, RequestError
from kvasir.core.keys import block_keys
from kvasir.core.request import Role
from tests.cluster.harness import BLOCK, SPEC, answer, cluster, default_brains, submission
from tests.cluster.virtual_time import run_virtual

PROMPT = list(range(1, 3 * BLOCK + 5))


class World:
    """A hub with two pools that answer at once, and a clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.told: list[tuple[str, Any]] = []
        self.deaf: set[str] = set()
        self.silent: set[str] = set()
        self.held = 2
        self.error: str | None = None
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
        if isinstance(message, Order) and peer not in self.silent:
            done = OrderDone(peer.removeprefix("pool@"), message.id, self.held, self.error)
            asyncio.get_running_loop().call_soon(self.hub.take, peer, done)
        return True

    def orders(self) -> list[tuple[str, Any]]:
        """What was told since the last time, all under the number 0."""
        told, self.told = self.told, []
        return [(peer, replace(order, id=0)) for peer, order in told]

    async def pin(
        self, prompt: list[int] = PROMPT, *, salt: str = "", ttl_s: float = 60.0, priority: PinPriority = "normal"
    ) -> str:
        return (await self.operator.pin(prompt, salt=salt, tenant="", ttl_s=ttl_s, priority=priority)).id


def keys_of(prompt: list[int], salt: str = "") -> tuple[bytes, ...]:
    return tuple(block_keys(SPEC.root_key(salt), prompt, BLOCK))


async def test_every_pool_is_told_to_clear_and_says_what_it_forgot() -> None:
    world = World()
    assert await world.operator.clear_cache() == {"node0": 2, "node1": 2}
    assert world.orders() == [("pool@node0", ClearCache(0)), ("pool@node1", ClearCache(0))]


def test_a_cleared_cache_is_empty_and_told_to_be() -> None:
    async def scenario() -> None:
        async with cluster({"mixed-0": Role.MIXED}) as found:
            operator = Operator(found.hub, found.tell, asyncio.get_running_loop().time)
            await answer(found.hub, submission("a", PROMPT, 4))
            assert (await answer(found.hub, submission("b", PROMPT, 4)))[1] == 3 * BLOCK
            await asyncio.sleep(2.0)
            assert (await operator.clear_cache())["node0"] >= 3
            await asyncio.sleep(2.0)
            assert found.host.node.inventory() == ()
            assert (await answer(found.hub, submission("c", PROMPT, 4)))[1] == 0
            await asyncio.sleep(40.0)
            found.check()

    run_virtual(scenario())


def test_pinned_blocks_stay_while_others_are_evicted_and_go_when_they_are_unpinned() -> None:
    async def scenario() -> None:
        async with cluster({"mixed-0": Role.MIXED}, num_slots=40) as found:
            operator = Operator(found.hub, found.tell, asyncio.get_running_loop().time)
            rng = Random(1)

            async def crowd(name: str) -> None:
                for number in range(10):
                    prompt = [rng.randrange(1, 997) for _ in range(15 * BLOCK)]
                    await answer(found.hub, submission(f"{name}{number}", prompt, 2))

            await answer(found.hub, submission("a", PROMPT, 4))
            await asyncio.sleep(2.0)
            pin = await operator.pin(PROMPT, salt="", tenant="", ttl_s=3600.0, priority="low")
            assert pin.held == {"node0": 3}
            await crowd("b")
            assert (await answer(found.hub, submission("c", PROMPT, 2)))[1] == 3 * BLOCK
            await operator.unpin(pin.id)
            await crowd("d")
            assert (await answer(found.hub, submission("e", PROMPT, 2)))[1] == 0
            await asyncio.sleep(40.0)
            found.check()

    run_virtual(scenario())


def test_more_pins_than_half_of_the_pool_are_refused_with_the_pool_s_own_words() -> None:
    async def scenario() -> None:
        async with cluster({"mixed-0": Role.MIXED}, num_slots=40) as found:
            operator = Operator(found.hub, found.tell, asyncio.get_running_loop().time)
            prompt = [1 + n % 900 for n in range(25 * BLOCK)]
            await answer(found.hub, submission("a", prompt, 2))
            await asyncio.sleep(2.0)
            with pytest.raises(ClusterError, match="node0: "):
                await operator.pin(prompt, salt="", tenant="", ttl_s=60.0, priority="high")
            assert await operator.set_quota("abc", 5) == {"node0": 5}
            await asyncio.sleep(2.0)
            (usage,) = [usage for usage in found.hub.status().pools["node0"].tenants if usage.tenant == "abc"]
            assert usage.quota == 5

    run_virtual(scenario())


async def test_a_pin_names_the_full_blocks_under_the_salt() -> None:
    world = World()
    await world.pin(salt="s", ttl_s=30.0, priority="high")
    order = PinBlocks(0, keys_of(PROMPT, "s"), 30.0, "high")
    assert world.orders() == [("pool@node0", order), ("pool@node1", order)]
    (status,) = world.operator.pins()
    assert (status.num_tokens, status.num_blocks, status.ttl_s) == (len(PROMPT), 3, 30.0)
    assert status.held == {"node0": 2, "node1": 2}


async def test_less_than_a_block_is_nothing_to_pin_nor_is_what_nobody_has() -> None:
    world = World()
    with pytest.raises(RequestError, match="nothing to pin"):
        await world.pin([1, 2, 3])
    assert world.orders() == []
    world.held = 0
    with pytest.raises(RequestError, match="send it once"):
        await world.pin()
    assert world.operator.pins() == []


async def test_a_pool_that_comes_later_hears_what_still_holds() -> None:
    world = World()
    await world.pin(ttl_s=50.0)
    await world.pin(PROMPT[:BLOCK], ttl_s=5.0)
    await world.operator.set_quota("a", 10)
    await world.operator.set_quota("b", 10)
    await world.operator.set_quota("b", None)
    world.orders()
    world.now += 20.0
    world.hub.take("pool@node2", HelloPool("node2", 64))
    pin, quota = PinBlocks(0, keys_of(PROMPT), 30.0, "normal"), SetTenantQuota(0, "a", 10)
    assert world.orders() == [("pool@node2", pin), ("pool@node2", quota)]


async def test_unpinning_leaves_what_another_pin_holds() -> None:
    world = World()
    long = await world.pin()
    await world.pin(PROMPT[: 2 * BLOCK], priority="low")
    await world.pin([7] * BLOCK)
    world.orders()
    await world.operator.unpin(long)
    told = [order for peer, order in world.orders() if peer == "pool@node0"]
    assert told == [UnpinBlocks(0, keys_of(PROMPT)), PinBlocks(0, keys_of(PROMPT[: 2 * BLOCK]), 60.0, "low")]
    with pytest.raises(RequestError, match="no such pin"):
        await world.operator.unpin(long)


async def test_pins_expire_and_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_module, "MAX_PINS", 2)
    world = World()
    await world.pin(ttl_s=10.0)
    await world.pin(ttl_s=90.0)
    with pytest.raises(RequestError, match="delete one"):
        await world.pin()
    world.now += 11.0
    await world.pin()
    assert len(world.operator.pins()) == 2


async def test_a_pool_that_cannot_be_reached_or_refuses_is_an_error_and_no_pin() -> None:
    world = World()
    world.deaf = {"pool@node1"}
    with pytest.raises(ClusterError, match="node1: cannot be reached"):
        await world.pin()
    world.deaf, world.error = set(), "more than half would be pinned"
    with pytest.raises(ClusterError, match="node0: more than half"):
        await world.pin()
    assert world.operator.pins() == []


def test_a_pool_that_is_silent_is_named_after_the_deadline() -> None:
    async def scenario() -> None:
        world = World()
        world.silent = {"pool@node1"}
        with pytest.raises(DeadlineExceeded, match="no answer from the pool of node1"):
            await world.operator.clear_cache()
        world.hub.take("pool@node1", OrderDone("node1", 1, 7))  # too late, and nobody's any more
        world.silent = set()
        assert await world.operator.clear_cache() == {"node0": 2, "node1": 2}

    run_virtual(scenario())


async def test_decisions_come_newest_first_and_are_bounded() -> None:
    world = World()
    for number in range(operator_module.MAX_DECISIONS + 5):
        world.hub.on_decision(Decision(f"r{number}", "mooncake", float(number)))
    assert [timed.decision.request_id for timed in world.operator.decisions(2)] == ["r1004", "r1003"]
    assert len(world.operator.decisions(10**6)) == operator_module.MAX_DECISIONS
    assert world.operator.decisions(1)[0].age_s == 100.0 - 1004
