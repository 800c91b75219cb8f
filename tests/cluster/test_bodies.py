"""The live bodies together, in virtual time: every path gives the tokens of an undisturbed run, and nothing is left behind."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from random import Random

import pytest

from kvasir.cluster.hub import Hub
from kvasir.cluster.messages import StepOutput, TokenOut
from kvasir.cluster.service import RequestFailed, Submission
from kvasir.core.commands import Command, Decision, SetRole
from kvasir.core.errors import RequestError
from kvasir.core.events import Event, NodeLost
from kvasir.core.request import FinishReason, Role
from kvasir.costs.fitted import FittedCost, PrefillFit
from tests.cluster.harness import BLOCK, COSTS, Cluster, answer, cluster, default_brains, expected, submission
from tests.cluster.virtual_time import run_virtual

SPLIT = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
MANY = {
    "prefill-0": Role.PREFILL,
    "prefill-1": Role.PREFILL,
    "decode-0": Role.DECODE,
    "decode-1": Role.DECODE,
    "mixed-0": Role.MIXED,
}


def prompt_of(seed: int, length: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(1, 997) for _ in range(length)]


async def settled(found: Cluster) -> None:
    """Let what is under way end, then check everything."""
    await asyncio.sleep(40.0)
    found.check()


@pytest.mark.parametrize("roles", [SPLIT, {"mixed-0": Role.MIXED}, MANY], ids=["1P+1D", "1M", "2P+2D+1M"])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 100, 6 * BLOCK])
def test_a_cold_prompt_is_answered_right(roles: dict[str, Role], length: int) -> None:
    async def scenario() -> None:
        async with cluster(roles) as found:
            prompt = prompt_of(1, length)
            assert await answer(found.hub, submission("r", prompt, 40)) == (expected(prompt, 40), 0)
            await settled(found)

    run_virtual(scenario())


def test_the_next_turn_of_a_chat_hits_what_prefill_and_decode_wrote() -> None:
    async def scenario() -> None:
        async with cluster(SPLIT) as found:
            first = prompt_of(2, 100)
            reply, _ = await answer(found.hub, submission("turn-1", first, 60))
            second = first + reply + prompt_of(3, 10)
            tokens, cached = await answer(found.hub, submission("turn-2", second, 20))
            assert tokens == expected(second, 20)
            # the KV of the last token of the reply was never computed
            assert cached == (len(first) + len(reply) - 1) // BLOCK * BLOCK
            await settled(found)

    run_virtual(scenario())


def test_predictions_come_to_what_a_slower_engine_takes() -> None:
    async def scenario() -> None:
        slower = FittedCost(PrefillFit(0.0, 5.0 * COSTS.prefill.per_token_s, 0.0, 0.0), COSTS.decode, 0.0, 1e9)
        brains = default_brains(512, "mooncake", 64, 16)
        async with cluster(SPLIT, brains=replace(brains, costs=slower)) as found:
            clock, decisions = asyncio.get_running_loop().time, list[Decision]()
            found.hub.on_decision = decisions.append
            took_s = []
            for turn in range(8):
                before_s = clock()
                await answer(found.hub, submission(f"r{turn}", prompt_of(turn, 2000), 1))
                took_s.append(clock() - before_s)
                await asyncio.sleep(2.0)  # a heartbeat and a tick
            predicted_s = [decision.ttft_s or 0.0 for decision in decisions]
            assert predicted_s[0] < 0.3 * took_s[0]
            assert predicted_s[-1] == pytest.approx(took_s[-1], rel=0.1)
            await settled(found)

    run_virtual(scenario())


def test_another_salt_never_hits() -> None:
    async def scenario() -> None:
        async with cluster(SPLIT) as found:
            prompt = prompt_of(4, 200)
            assert (await answer(found.hub, submission("a", prompt, 5, salt="alice")))[1] == 0
            assert (await answer(found.hub, submission("b", prompt, 5, salt="bob")))[1] == 0
            assert (await answer(found.hub, submission("c", prompt, 5, salt="alice")))[1] == 200 // BLOCK * BLOCK
            await settled(found)

    run_virtual(scenario())


async def ask(hub: Hub, asked: Submission, give_up_after: int | None) -> list[int]:
    """An answer, or its beginning when the client goes away after some tokens."""
    tokens: list[int] = []
    async with aclosing(hub.submit(asked)) as outputs:
        async for output in outputs:
            tokens += [token.token for token in output.tokens]
            if give_up_after is not None and len(tokens) >= give_up_after:
                break
    return tokens


def mixed_traffic(seed: int, count: int, over_s: float) -> list[tuple[float, Submission, int | None]]:
    """(arrival, request, tokens after which its client goes away): shared prefixes, all lengths, a third aborted."""
    rng = Random(seed)
    shared = [prompt_of(100 + i, rng.randrange(20, 300)) for i in range(6)]
    traffic = []
    for number in range(count):
        prompt = rng.choice(shared) + prompt_of(seed * 1000 + number, rng.randrange(1, 120))
        asked = submission(f"r{number}", prompt, rng.randrange(1, 60))
        traffic.append((rng.uniform(0, over_s), asked, rng.randrange(0, 20) if rng.random() < 0.33 else None))
    return traffic


async def run_traffic(found: Cluster, seed: int, count: int, over_s: float | None = None) -> None:
    """Arrivals `over_s` seconds, 40 in each unless said."""

    async def one(arrival_s: float, asked: Submission, give_up_after: int | None) -> None:
        await asyncio.sleep(arrival_s)
        tokens = await ask(found.hub, asked, give_up_after)
        whole = expected(asked.prompt, asked.max_tokens)
        assert tokens == (whole if give_up_after is None else whole[: len(tokens)])

    async with asyncio.TaskGroup() as clients:
        for item in mixed_traffic(seed, count, over_s or count / 40):
            clients.create_task(one(*item))


@pytest.mark.parametrize("num_slots", [2048, 96], ids=["roomy", "scarce"])
@pytest.mark.parametrize("roles", [SPLIT, MANY, {"mixed-0": Role.MIXED}], ids=["1P+1D", "2P+2D+1M", "1M"])
def test_500_requests_with_random_aborts_leave_no_block_behind(roles: dict[str, Role], num_slots: int) -> None:
    async def scenario() -> None:
        async with cluster(roles, num_slots=num_slots) as found:
            await run_traffic(found, seed=5, count=500)
            await settled(found)

    run_virtual(scenario())


@pytest.mark.parametrize(("num_slots", "count"), [(64, 8), (128, 40)])
def test_a_pool_too_small_for_all_at_once_serves_them_one_after_another_without_standing_still(
    num_slots: int, count: int
) -> None:
    async def scenario() -> None:
        async with cluster(SPLIT, num_slots=num_slots) as found:
            started = asyncio.get_running_loop().time()
            prompts = [prompt_of(400 + number, 100) for number in range(count)]
            asked = [answer(found.hub, submission(f"r{number}", prompt, 100)) for number, prompt in enumerate(prompts)]
            for prompt, (tokens, _) in zip(prompts, await asyncio.gather(*asked), strict=True):
                assert tokens == expected(prompt, 100)
            assert asyncio.get_running_loop().time() - started < 0.3 * count
            await settled(found)

    run_virtual(scenario())


def test_a_last_token_that_arrives_after_its_instance_died_ends_the_request() -> None:
    async def scenario() -> None:
        async with cluster(SPLIT) as found:
            asked = asyncio.create_task(answer(found.hub, submission("r", prompt_of(12, 50), 60)))
            await asyncio.sleep(0.05)
            found.kill("decode-0")
            found.hub.take("decode-0", StepOutput("decode-0", (TokenOut("r#1", 5, finish=FinishReason.STOP),)))
            assert (await asked)[0][-1] == 5
            found.start("decode-0", Role.DECODE, 2)
            await asyncio.sleep(1.0)
            await settled(found)

    run_virtual(scenario())


def test_an_instance_that_dies_while_its_role_changes_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with cluster(MANY) as found:
            handle = found.conductor.handle

            def with_a_change(event: Event, now: float) -> list[Command]:
                changes: list[Command] = [SetRole("prefill-1", Role.MIXED)] if isinstance(event, NodeLost) else []
                return [*handle(event, now), *changes]

            monkeypatch.setattr(found.conductor, "handle", with_a_change)
            found.hub.lose_node("elsewhere")
            found.kill("prefill-1")
            await asyncio.sleep(1.0)
            assert "prefill-1" not in {instance.id for instance in found.conductor.instances}
            prompt = prompt_of(15, 300)
            assert (await answer(found.hub, submission("r", prompt, 10)))[0] == expected(prompt, 10)
            await settled(found)

    run_virtual(scenario())


def test_a_request_id_may_be_used_again_after_its_client_went_away() -> None:
    async def scenario() -> None:
        async with cluster(SPLIT) as found:
            assert len(await ask(found.hub, submission("same", prompt_of(13, 50), 200), give_up_after=3)) == 3
            prompt = prompt_of(14, 60)
            assert (await answer(found.hub, submission("same", prompt, 40)))[0] == expected(prompt, 40)
            await settled(found)

    run_virtual(scenario())


@pytest.mark.parametrize(("prompt", "max_tokens"), [([], 5), ([1] * 4096, 5), ([1], 0)])
def test_what_no_instance_could_run_is_refused_before_it_reaches_one(prompt: list[int], max_tokens: int) -> None:
    async def scenario() -> None:
        async with cluster(SPLIT) as found:
            with pytest.raises(RequestError, match="prompt of 1 to 4095 tokens"):
                await answer(found.hub, submission("r", prompt, max_tokens))

    run_virtual(scenario())


async def die_and_come_back(found: Cluster, roles: dict[str, Role], seed: int) -> None:
    """One instance after the other, for a while each."""
    rng = Random(seed)
    for epoch in range(2, 10):
        await asyncio.sleep(rng.uniform(0.1, 1.0))
        name = rng.choice(sorted(found.batchers))
        found.kill(name)
        await asyncio.sleep(rng.uniform(0.0, 0.5))
        found.start(name, roles[name], epoch)


@pytest.mark.parametrize("seed", range(4))
def test_instances_die_and_come_back_and_every_stream_goes_on(seed: int) -> None:
    async def scenario() -> None:
        async with cluster(MANY, num_slots=1024) as found:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(die_and_come_back(found, MANY, seed))
                tasks.create_task(run_traffic(found, seed=10 + seed, count=200))
            await settled(found)

    run_virtual(scenario())


def test_a_request_that_arrives_when_nobody_can_decode_fails_at_once() -> None:
    async def scenario() -> None:
        async with cluster(SPLIT) as found:
            found.kill("decode-0")
            with pytest.raises(RequestFailed, match="decode"):
                await answer(found.hub, submission("r", prompt_of(6, 50), 10))
            found.conductor.check()

    run_virtual(scenario())


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("after_s", [0.004, 0.05])
def test_a_stream_waits_for_its_only_instance_to_come_back(victim: str, after_s: float) -> None:
    async def scenario() -> None:
        async with cluster(SPLIT) as found:
            prompt = prompt_of(8, 100)
            asked = asyncio.create_task(answer(found.hub, submission("r", prompt, 60)))
            await asyncio.sleep(after_s)
            found.kill(victim)
            await asyncio.sleep(5.0)
            found.start(victim, SPLIT[victim], 2)
            assert (await asked)[0] == expected(prompt, 60)
            await settled(found)

    run_virtual(scenario())


def test_a_stream_fails_when_its_only_instance_never_comes_back() -> None:
    async def scenario() -> None:
        async with cluster(SPLIT) as found:
            asked = asyncio.create_task(answer(found.hub, submission("r", prompt_of(9, 100), 60)))
            await asyncio.sleep(0.05)
            found.kill("decode-0")
            with pytest.raises(RequestFailed, match="no decode instance came back"):
                await asked
            found.conductor.check()

    run_virtual(scenario())


def test_the_last_output_says_why_it_was_the_last() -> None:
    async def scenario() -> None:
        async with cluster(SPLIT) as found:
            outputs = [output async for output in found.hub.submit(submission("r", prompt_of(7, 30), 3))]
            assert [output.finish_reason for output in outputs] == [None, None, FinishReason.LENGTH]
            assert [output.cached_tokens for output in outputs] == [0, None, None]

    run_virtual(scenario())
