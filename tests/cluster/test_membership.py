"""Nodes join, renew their lease, drain, leave, and are lost when they fall silent."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace

from kvasir.cluster.membership import DRAIN_S, LEASE_S, Members
from kvasir.cluster.messages import (
    EndInstance,
    Goodbye,
    HelloNode,
    HubAlive,
    InstanceGone,
    LeaveNode,
    NodeAlive,
    NotWelcome,
    ToJoiner,
    Welcome,
)
from kvasir.core.request import Role
from tests.cluster.harness import SPEC, Cluster, answer, cluster, expected, submission
from tests.cluster.test_bodies import prompt_of
from tests.cluster.virtual_time import run_virtual

ROLES = {"mixed-0": Role.MIXED, "mixed-0@node1": Role.MIXED}


@dataclass
class Door:
    """The members of a cluster, and what was sent to whom."""

    found: Cluster
    sent: list[tuple[str, ToJoiner]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.members = Members(self.found.hub, self._send, asyncio.get_running_loop().time)

    def _send(self, peer: str, message: ToJoiner) -> bool:
        self.sent.append((peer, message))
        return True

    def join(self, peer: str = "agent#1", **changes: Any) -> ToJoiner:
        self.members.take(peer, HelloNode(replace(SPEC, **changes), 1))
        return self.sent[-1][1]

    def joined(self, node: str) -> bool:
        return any(status.info.node == node for status in self.found.hub.status().instances)


def test_a_node_of_the_same_model_gets_a_name_and_the_clusters_limits() -> None:
    async def scenario() -> None:
        async with cluster(ROLES) as found:
            assert Door(found).join(max_model_len=9999) == Welcome("node1", 1, SPEC.max_model_len, LEASE_S)

    run_virtual(scenario())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"identity": "another"}, "identity is 'another', the cluster's is 'fake'"),
        ({"block_tokens": 32}, "block_tokens is 32"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'"),
        ({"max_model_len": 100}, "give it more --dram, or the head --max-model-len 100"),
    ],
)
def test_a_node_whose_kv_could_not_be_shared_is_refused_with_the_reason(changes: dict[str, Any], told: str) -> None:
    async def scenario() -> None:
        async with cluster(ROLES) as found:
            door = Door(found)
            refusal = door.join(**changes)
            assert isinstance(refusal, NotWelcome)
            assert told in refusal.reason
            assert door.members.nodes == ()

    run_virtual(scenario())


def test_names_are_never_used_again_and_an_unheard_welcome_is_repeated_with_another() -> None:
    async def scenario() -> None:
        async with cluster(ROLES) as found:
            door = Door(found)
            names = [door.join("agent#1"), door.join("agent#1"), door.join("agent#2")]
            assert [w.node for w in names if isinstance(w, Welcome)] == ["node1", "node2", "node3"]
            assert door.members.nodes == ("node2", "node3")

    run_virtual(scenario())


def test_a_node_that_does_not_renew_its_lease_is_lost_and_told_so_when_it_speaks_again() -> None:
    async def scenario() -> None:
        async with cluster(ROLES) as found:
            door = Door(found)
            door.join()
            running = asyncio.create_task(door.members.run())
            for _ in range(5):
                await asyncio.sleep(0.8 * LEASE_S)
                door.members.take("agent#1", NodeAlive("node1", 1))
                assert door.sent[-1] == ("agent#1", HubAlive(known=True))
            assert door.joined("node1")
            await asyncio.sleep(1.2 * LEASE_S)
            assert not door.joined("node1")
            door.members.take("agent#1", NodeAlive("node1", 1))
            assert door.sent[-1] == ("agent#1", HubAlive(known=False))
            running.cancel()

    run_virtual(scenario())


def test_a_leaving_node_finishes_what_it_has_and_gets_nothing_new() -> None:
    async def scenario() -> None:
        async with cluster(ROLES, policy="round-robin") as found:
            door = Door(found)
            door.join()
            running = asyncio.create_task(door.members.run())
            asked = [submission(f"r{n}", prompt_of(n, 50), 300) for n in range(6)]
            answers = [asyncio.create_task(answer(found.hub, one)) for one in asked]
            await asyncio.sleep(0.1)
            for _ in range(3):
                door.members.take("agent#1", LeaveNode("node1"))  # it may ask more than once
            late = submission("late", prompt_of(99, 20), 5)
            assert (await answer(found.hub, late))[0] == expected(late.prompt, 5)
            for one, task in zip(asked, answers, strict=True):
                door.members.take("agent#1", NodeAlive("node1", 1))
                assert (await task)[0] == expected(one.prompt, 300)
            await asyncio.sleep(1.0)
            assert [message for _, message in door.sent if isinstance(message, Goodbye)] == [Goodbye()]
            assert not door.joined("node1")
            assert found.hub.status().counters.get("placed_again", 0) == 0
            running.cancel()

    run_virtual(scenario())


def test_a_node_that_takes_too_long_to_drain_is_let_go_and_its_requests_are_answered_elsewhere() -> None:
    async def scenario() -> None:
        async with cluster(ROLES) as found:
            door = Door(found)
            door.join()
            running = asyncio.create_task(door.members.run())

            async def renew() -> None:
                while True:
                    door.members.take("agent#1", NodeAlive("node1", 1))
                    await asyncio.sleep(1.0)

            renewing = asyncio.create_task(renew())
            long = submission("long", prompt_of(7, 50), 3900)
            task = asyncio.create_task(answer(found.hub, long))
            await asyncio.sleep(0.1)
            door.members.take("agent#1", LeaveNode("node1"))
            await asyncio.sleep(DRAIN_S + 5.0)
            assert not door.joined("node1")
            assert (await task)[0] == expected(long.prompt, 3900)
            running.cancel()
            renewing.cancel()

    run_virtual(scenario())


def test_a_silent_instance_is_ended_by_its_own_node_and_lost_when_its_process_is_gone() -> None:
    async def scenario() -> None:
        async with cluster(ROLES) as found:
            door = Door(found)
            door.join()
            door.members.end_instance("mixed-0@node1")
            assert door.sent[-1] == ("agent#1", EndInstance("mixed-0@node1"))
            assert door.joined("node1")
            door.members.take("agent#1", InstanceGone("node1", "mixed-0@node1"))
            assert not door.joined("node1")

    run_virtual(scenario())
