"""Several nodes in virtual time: prefixes and hand-offs cross between them, and no token differs whoever dies."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from random import Random

import pytest

from kvasir.cluster.pool_host import HUB, HUB_EPOCH
from kvasir.core.errors import ClusterError
from kvasir.core.pool_events import SetQuota
from kvasir.core.request import Role
from kvasir.store.messenger import Priority
from tests.cluster.harness import BLOCK, Cluster, answer, cluster, expected, submission
from tests.cluster.test_bodies import prompt_of, run_traffic, settled
from tests.cluster.virtual_time import run_virtual

ACROSS = {"prefill-0": Role.PREFILL, "decode-0@node1": Role.DECODE}
TWO_MIXED = {"mixed-0": Role.MIXED, "mixed-0@node1": Role.MIXED}
TWO_SPLIT = {
    "prefill-0": Role.PREFILL,
    "decode-0": Role.DECODE,
    "prefill-0@node1": Role.PREFILL,
    "decode-0@node1": Role.DECODE,
}


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 100, 6 * BLOCK])
def test_a_hand_off_crosses_to_another_node(length: int) -> None:
    async def scenario() -> None:
        async with cluster(ACROSS) as found:
            prompt = prompt_of(1, length)
            assert await answer(found.hub, submission("r", prompt, 40)) == (expected(prompt, 40), 0)
            assert sum(count for _, _, count in found.mover.reads) == -(-length // BLOCK), "each block once"
            assert {way[:2] for way in found.mover.reads} == {("node0", "node1")}
            await settled(found)

    run_virtual(scenario())


def test_blocks_follow_while_the_prefill_runs_so_that_its_last_chunk_is_what_a_hand_off_waits_for() -> None:
    async def scenario() -> None:
        async with cluster(ACROSS) as found:
            prompt = prompt_of(4, 400)
            assert await answer(found.hub, submission("r", prompt, 10)) == (expected(prompt, 10), 0)
            *followed, (_, _, last) = found.mover.reads
            assert sum(count for _, _, count in followed) >= (400 - 64) // BLOCK - 1
            assert last <= 64 // BLOCK + 1, "a chunk has 64 tokens"
            await settled(found)

    run_virtual(scenario())


def test_the_next_turn_hands_off_only_what_the_decode_node_lacks() -> None:
    async def scenario() -> None:
        async with cluster(ACROSS) as found:
            first = prompt_of(2, 100)
            reply, _ = await answer(found.hub, submission("turn-1", first, 60))
            second = first + reply + prompt_of(3, 10)
            assert (await answer(found.hub, submission("turn-2", second, 20)))[0] == expected(second, 20)
            moved = sum(count for source, target, count in found.mover.reads if (source, target) == ("node0", "node1"))
            assert moved < 100 / BLOCK + 1 + len(second) / BLOCK  # not the whole prompt again
            await settled(found)

    run_virtual(scenario())


def test_blocks_that_decode_wrote_are_fetched_by_the_node_that_prefills_the_next_turn() -> None:
    async def scenario() -> None:
        async with cluster(ACROSS, policy="memserve") as found:
            first = prompt_of(2, 20 * BLOCK)
            reply, _ = await answer(found.hub, submission("turn-1", first, 10 * BLOCK))
            await asyncio.sleep(1.0)
            second = first + reply + prompt_of(3, 10)
            tokens, cached = await answer(found.hub, submission("turn-2", second, 20))
            assert tokens == expected(second, 20)
            assert ("node1", "node0", 9) in found.mover.reads
            assert cached == (len(first) + len(reply) - 1) // BLOCK * BLOCK
            await settled(found)

    run_virtual(scenario())


def test_a_burst_that_shares_a_prefix_fetches_it_once() -> None:
    async def scenario() -> None:
        async with cluster(TWO_MIXED, policy="memserve") as found:
            shared = prompt_of(5, 40 * BLOCK)
            await answer(found.hub, submission("first", shared, 5))
            await asyncio.sleep(1.0)
            asked = [submission(f"r{number}", shared + prompt_of(50 + number, 600), 20) for number in range(12)]
            answers = await asyncio.gather(*(answer(found.hub, one) for one in asked))
            for one, (tokens, _) in zip(asked, answers, strict=True):
                assert tokens == expected(one.prompt, 20)
            assert [count for _, _, count in found.mover.reads].count(40) == 1
            await settled(found)

    run_virtual(scenario())


def test_a_fetch_that_stalls_is_raced_by_recompute() -> None:
    async def scenario() -> None:
        async with cluster(TWO_MIXED, policy="memserve") as found:
            shared = prompt_of(6, 40 * BLOCK)
            await answer(found.hub, submission("first", shared, 5))
            await asyncio.sleep(1.0)

            async def stall(priority: Priority) -> None:
                await asyncio.sleep(3600.0 if priority is Priority.FETCH else 0.0)

            found.mover.fault = stall
            started = asyncio.get_running_loop().time()
            asked = [submission(f"r{number}", shared + prompt_of(60 + number, 600), 20) for number in range(6)]
            answers = await asyncio.gather(*(answer(found.hub, one) for one in asked))
            for one, (tokens, _) in zip(asked, answers, strict=True):
                assert tokens == expected(one.prompt, 20)
            assert found.mover.reads
            assert asyncio.get_running_loop().time() - started < 5.0
            await settled(found)

    run_virtual(scenario())


def test_computing_starts_before_the_last_layer_has_come() -> None:
    async def scenario() -> None:
        async with cluster(TWO_MIXED, policy="memserve", chunk_tokens=4096) as found:
            found.mover.block_s = 4e-3
            ttft_s, cached = await fetched_ttft(found, blocks=10, rest=600)
            assert cached == 10 * BLOCK
            # 40 ms of transfer and 62 ms of compute: one after the other takes more than 100 ms
            assert ttft_s < 0.085
            await settled(found)

    run_virtual(scenario())


@pytest.mark.parametrize("after", [5, 25, 39])
def test_blocks_that_are_lost_after_computing_has_started_cost_no_token(after: int) -> None:
    async def scenario() -> None:
        async with cluster(TWO_MIXED, policy="memserve", chunk_tokens=4096) as found:
            found.mover.block_s = 4e-3
            pieces = 0

            async def cut_late(priority: Priority) -> None:
                nonlocal pieces
                pieces += priority is Priority.FETCH
                if pieces == after:
                    raise ClusterError("cut")

            found.mover.fault = cut_late
            await fetched_ttft(found, blocks=10, rest=600)
            assert pieces >= after
            await settled(found)

    run_virtual(scenario())


@pytest.mark.parametrize("give_up_s", [0.02, 0.035, 0.06])
def test_a_client_that_goes_away_while_layers_are_coming_leaves_nothing_behind(give_up_s: float) -> None:
    async def scenario() -> None:
        async with cluster(TWO_MIXED, policy="memserve", chunk_tokens=4096) as found:
            found.mover.block_s = 4e-3
            task = asyncio.create_task(fetched_ttft(found, blocks=10, rest=600))
            while not found.mover.reads:
                await asyncio.sleep(1e-3)
            await asyncio.sleep(give_up_s)
            task.cancel()
            await settled(found)

    run_virtual(scenario())


def test_blocks_that_a_quota_keeps_from_being_published_are_not_promised_to_anybody() -> None:
    async def scenario() -> None:
        async with cluster(TWO_MIXED, policy="memserve", chunk_tokens=4096) as found:
            found.mover.block_s = 4e-3
            for host in found.hosts.values():
                host.handle(SetQuota(HUB, HUB_EPOCH, "small", 4))
            await fetched_ttft(found, blocks=10, rest=600, tenant="small")
            assert found.hub.status().counters["placed_again"] == 1  # what was promised is not there
            assert ("node0", "node1", 10) in found.mover.reads
            await settled(found)

    run_virtual(scenario())


def test_what_was_on_offer_for_a_node_that_died_is_free_at_once() -> None:
    async def scenario() -> None:
        roles = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE, "decode-0@node1": Role.DECODE}
        async with cluster(roles) as found:
            asked = [submission(f"r{n}", prompt_of(500 + n, 100), 40) for n in range(8)]
            answers = [asyncio.create_task(answer(found.hub, one)) for one in asked]
            await asyncio.sleep(0.02)
            found.kill_node("node1", noticed_after_s=3.0)
            for one, task in zip(asked, answers, strict=True):
                assert (await task)[0] == expected(one.prompt, 40)
            assert found.hub.status().counters["placed_again"] > 0
            await asyncio.sleep(1.0)
            assert found.host.node.stats().leases == 0
            await settled(found)

    run_virtual(scenario())


async def fetched_ttft(found: Cluster, *, blocks: int, rest: int, tenant: str = "") -> tuple[float, int]:
    """TTFT and cached tokens of a prompt whose first blocks are on the other node, whose instance is busy."""
    shared = prompt_of(70, blocks * BLOCK)
    await answer(found.hub, submission("first", shared, 5))
    await asyncio.sleep(1.0)
    busy = asyncio.create_task(answer(found.hub, submission("busy", shared + prompt_of(71, 2000), 5)))
    await asyncio.sleep(0.01)
    asked = replace(submission("fetched", shared + prompt_of(72, rest), 20), tenant=tenant)
    started, first, cached, tokens = asyncio.get_running_loop().time(), 0.0, 0, list[int]()
    try:
        async with aclosing(found.hub.submit(asked)) as outputs:
            async for output in outputs:
                first = first or asyncio.get_running_loop().time()
                cached = cached if output.cached_tokens is None else output.cached_tokens
                tokens += [token.token for token in output.tokens]
    finally:
        await busy
    assert tokens == expected(asked.prompt, 20)
    return first - started, cached


@pytest.mark.parametrize("roles", [ACROSS, TWO_MIXED, TWO_SPLIT], ids=["P to D", "M+M", "PD+PD"])
@pytest.mark.parametrize("policy", ["mooncake", "memserve", "random"])
@pytest.mark.parametrize("num_slots", [2048, 128], ids=["roomy", "scarce"])
def test_traffic_over_two_nodes_with_broken_transfers_leaves_no_block_behind(
    roles: dict[str, Role], policy: str, num_slots: int
) -> None:
    async def scenario() -> None:
        async with cluster(roles, policy=policy, num_slots=num_slots) as found:
            rng = Random(9)

            async def sometimes(priority: Priority) -> None:
                chance = rng.random()
                if chance < 0.0003:
                    raise ClusterError("cut")
                if chance < 0.004:
                    await asyncio.sleep(rng.uniform(0.01, 2.0))

            found.mover.fault = sometimes
            await run_traffic(found, seed=7, count=200)
            await settled(found)

    run_virtual(scenario())


@pytest.mark.parametrize("roles", [TWO_MIXED, TWO_SPLIT], ids=["M+M", "PD+PD"])
def test_a_node_that_dies_in_the_middle_costs_no_answer(roles: dict[str, Role]) -> None:
    async def scenario() -> None:
        async with cluster(roles, policy="memserve") as found:
            asyncio.get_running_loop().call_later(2.0, found.kill_node, "node1")
            await run_traffic(found, seed=8, count=200)
            await settled(found)

    run_virtual(scenario())
