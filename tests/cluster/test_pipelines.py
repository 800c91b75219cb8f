"""Chunked pipelines in the live bodies: the tokens of one engine alone, and nothing left behind, whoever dies or goes away."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from kvasir.cluster.messages import ExtendRun, Phase, PipelineReady, RunRequest, StageComputed, StagePlan
from kvasir.cluster.pipelines import Over, Pipelines
from kvasir.core.commands import Decision
from kvasir.core.request import Role, Sampling, Slo
from tests.cluster.harness import BLOCK, Brains, Cluster, answer, cluster, default_brains, expected, node_of, submission
from tests.cluster.test_bodies import die_and_come_back, prompt_of, run_traffic, settled
from tests.cluster.virtual_time import run_virtual

HURRY = 0.02
"""A TTFT in seconds that no instance alone meets with a prompt of a few hundred tokens."""

PREFILLS = {f"prefill-{number}": Role.PREFILL for number in range(4)}
SPLIT = {**PREFILLS, "decode-0": Role.DECODE}


def brains(*, stages: int = 4, num_slots: int = 512, ttft_s: float = HURRY) -> Brains:
    return default_brains(num_slots, "kvasir", 64, 16, max_stages=stages, slo=Slo(ttft_s, 0.1))


def groups(found: Cluster) -> list[tuple[str, ...]]:
    """Of each decision from now on, who prefills."""
    chosen: list[tuple[str, ...]] = []

    def hear(decision: Decision) -> None:
        chosen.append(decision.candidates[0].members)

    found.hub.on_decision = hear
    return chosen


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("length", [300, 20 * BLOCK, 20 * BLOCK + 1])
def test_a_prompt_that_one_instance_cannot_answer_in_time_goes_through_several(stages: int, length: int) -> None:
    async def scenario() -> None:
        async with cluster(SPLIT, brains=brains(stages=stages)) as found:
            chosen = groups(found)
            prompt = prompt_of(1, length)
            assert await answer(found.hub, submission("r", prompt, 40)) == (expected(prompt, 40), 0)
            assert [len(group) for group in chosen] == [stages]
            assert found.hub.status().counters["pipelines"] == 1
            await settled(found)

    run_virtual(scenario())


def test_a_pipeline_begins_after_the_cached_prefix_and_leaves_its_blocks_to_the_next_turn() -> None:
    async def scenario() -> None:
        async with cluster(SPLIT, brains=brains()) as found:
            chosen = groups(found)
            history = prompt_of(2, 300)
            for turn in range(4):
                before = len(history)
                history = history + prompt_of(10 + turn, 333)
                reply, cached = await answer(found.hub, submission(f"turn-{turn}", history, 30))
                assert reply == expected(history, 30)
                # the KV of the last token of the reply before was never computed
                assert cached == (0 if turn == 0 else (before - 1) // BLOCK * BLOCK)
                history = history + reply
            assert [len(group) for group in chosen] == [4, 4, 4, 4]
            await settled(found)

    run_virtual(scenario())


def test_the_last_stage_goes_on_to_decode_where_it_may() -> None:
    async def scenario() -> None:
        mixed = {"mixed-0": Role.MIXED, "mixed-1": Role.MIXED}
        async with cluster(mixed, brains=brains()) as found:
            chosen = groups(found)
            prompt = prompt_of(3, 700)
            assert (await answer(found.hub, submission("r", prompt, 50)))[0] == expected(prompt, 50)
            assert [len(group) for group in chosen] == [2]
            await settled(found)

    run_virtual(scenario())


def test_stages_are_of_one_node() -> None:
    async def scenario() -> None:
        roles = {f"prefill-{number}@node{number % 2}": Role.PREFILL for number in range(4)} | {"decode-0": Role.DECODE}
        async with cluster(roles, brains=brains()) as found:
            chosen = groups(found)
            prompts = [prompt_of(20 + number, 500) for number in range(4)]
            asked = [answer(found.hub, submission(f"r{number}", prompt, 20)) for number, prompt in enumerate(prompts)]
            for prompt, (tokens, _) in zip(prompts, await asyncio.gather(*asked), strict=True):
                assert tokens == expected(prompt, 20)
            assert [len(group) for group in chosen][:2] == [2, 2]
            assert all(len(set(map(node_of, group))) == 1 for group in chosen)
            await settled(found)

    run_virtual(scenario())


@pytest.mark.parametrize("num_slots", [2048, 96], ids=["roomy", "scarce"])
@pytest.mark.parametrize("roles", [SPLIT, {"mixed-0": Role.MIXED, "mixed-1": Role.MIXED}], ids=["4P+1D", "2M"])
def test_500_requests_with_random_aborts_leave_no_block_behind(roles: dict[str, Role], num_slots: int) -> None:
    async def scenario() -> None:
        async with cluster(roles, num_slots=num_slots, brains=brains(num_slots=num_slots, ttft_s=0.008)) as found:
            await run_traffic(found, seed=6, count=500, over_s=60.0)
            assert found.hub.status().counters["pipelines"] > 20
            await settled(found)

    run_virtual(scenario())


@pytest.mark.parametrize("victim", PREFILLS)
@pytest.mark.parametrize("after_ms", range(1, 60, 3))
def test_a_stage_that_dies_changes_no_token(victim: str, after_ms: int) -> None:
    async def scenario() -> None:
        async with cluster(SPLIT, brains=brains()) as found:
            prompts = [prompt_of(30, 640), prompt_of(31, 500)]
            asked = [asyncio.create_task(answer(found.hub, submission(f"r{i}", p, 30))) for i, p in enumerate(prompts)]
            await asyncio.sleep(after_ms / 1000)
            found.kill(victim)
            await asyncio.sleep(0.01)
            found.start(victim, Role.PREFILL, 2)
            for prompt, task in zip(prompts, asked, strict=True):
                assert (await task)[0] == expected(prompt, 30)
            again = prompts[0] + prompt_of(32, 300)
            assert (await answer(found.hub, submission("again", again, 20)))[0] == expected(again, 20)
            await settled(found)

    run_virtual(scenario())


@pytest.mark.parametrize("after_ms", range(0, 60, 2))
def test_a_client_that_goes_away_leaves_nothing(after_ms: int) -> None:
    async def scenario() -> None:
        async with cluster(SPLIT, brains=brains()) as found:

            async def begin() -> None:
                async with aclosing(found.hub.submit(submission("gone", prompt_of(40, 640), 30))) as outputs:
                    async for _ in outputs:
                        pass

            gone = asyncio.create_task(begin())
            await asyncio.sleep(after_ms / 1000)
            gone.cancel()
            prompt = prompt_of(40, 640) + prompt_of(41, 100)
            assert (await answer(found.hub, submission("next", prompt, 20)))[0] == expected(prompt, 20)
            await settled(found)

    run_virtual(scenario())


TWO_NODES = {f"prefill-{number}@node{number % 2}": Role.PREFILL for number in range(4)} | {
    "decode-0": Role.DECODE,
    "decode-1@node1": Role.DECODE,
}


@pytest.mark.parametrize("seed", range(4))
def test_stages_die_and_come_back_on_two_nodes_and_every_stream_goes_on(seed: int) -> None:
    async def scenario() -> None:
        num_slots = 2048 if seed % 2 else 128
        async with cluster(TWO_NODES, num_slots=num_slots, brains=brains(num_slots=num_slots, ttft_s=0.008)) as found:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(die_and_come_back(found, TWO_NODES, seed))
                tasks.create_task(run_traffic(found, seed=10 + seed, count=200, over_s=10.0))
            assert found.hub.status().counters["pipelines"] > 20
            await settled(found)

    run_virtual(scenario())


def test_a_node_that_dies_with_its_pipelines_costs_no_answer() -> None:
    async def scenario() -> None:
        async with cluster(TWO_NODES, num_slots=1024, brains=brains(num_slots=1024, ttft_s=0.008)) as found:
            asyncio.get_running_loop().call_later(5.0, found.kill_node, "node1")
            await run_traffic(found, seed=8, count=200, over_s=10.0)
            assert found.hub.status().counters["pipelines"] > 20
            await settled(found)

    run_virtual(scenario())


def test_where_the_pool_has_no_room_for_a_pipeline_one_instance_waits_for_it() -> None:
    async def scenario() -> None:
        roles = {"prefill-0": Role.PREFILL, "prefill-1": Role.PREFILL, "decode-0": Role.DECODE}
        async with cluster(roles, num_slots=60, brains=brains(num_slots=60)) as found:
            chosen = groups(found)
            first, second = prompt_of(50, 500), prompt_of(51, 400)
            long = asyncio.create_task(answer(found.hub, submission("long", first, 40)))
            await asyncio.sleep(0.1)
            assert (await answer(found.hub, submission("second", second, 20)))[0] == expected(second, 20)
            assert (await long)[0] == expected(first, 40)
            assert [len(group) for group in chosen] == [2, 2, 1]
            await settled(found)

    run_virtual(scenario())


# --- who is told what --------------------------------------------------------------------------------------------

REQUEST = RunRequest(
    run="r#1",
    phase=Phase.PREFILL,
    tokens=bytes(4 * 100),
    max_total_tokens=110,
    sampling=Sampling(),
    stop_tokens=(),
    root=b"",
    stage=StagePlan(2, 3),
)
PLAN = StagePlan(2, 3, cached=0, pages=(1, 2), mail=((3,), (4,)))
MAIL, PAGES = "r#1/mail", "r#1"


def begun() -> Pipelines:
    pipelines = Pipelines()
    pipelines.begin(REQUEST, ("a", "b", "c"), "node0")
    return pipelines


def test_the_other_stages_are_told_when_there_are_pages() -> None:
    told = list(begun().ready(PipelineReady("r#1", "c", PLAN)))
    assert [(name, request.stage) for name, request in told] == [
        ("a", StagePlan(0, 3, 0, PLAN.pages, PLAN.mail)),
        ("b", StagePlan(1, 3, 0, PLAN.pages, PLAN.mail)),
    ]


def test_each_stage_is_told_how_far_the_one_before_is() -> None:
    pipelines = begun()
    list(pipelines.ready(PipelineReady("r#1", "c", PLAN)))
    assert pipelines.computed(StageComputed("r#1", "a", 64)) == ("b", ExtendRun("r#1", 64))
    assert pipelines.computed(StageComputed("r#1", "b", 64)) == ("c", ExtendRun("r#1", 64))
    assert pipelines.computed(StageComputed("r#1", "c", 64)) is None


def test_only_the_mail_goes_back_when_all_have_done_their_part() -> None:
    pipelines = begun()
    list(pipelines.ready(PipelineReady("r#1", "c", PLAN)))
    assert pipelines.done(StageComputed("r#1", "a", 64)) is None
    assert pipelines.done(StageComputed("r#1", "a", 100)) is None
    assert pipelines.done(StageComputed("r#1", "b", 100)) is None
    assert pipelines.done(StageComputed("r#1", "c", 100)) == Over("node0", (MAIL,))
    assert pipelines.left("r#1", "c") is None


def test_after_a_death_pages_go_back_when_the_last_who_may_write_has_left() -> None:
    pipelines = begun()
    list(pipelines.ready(PipelineReady("r#1", "c", PLAN)))
    assert pipelines.lost("b") == []
    assert pipelines.computed(StageComputed("r#1", "a", 64)) is None  # nobody is there to go on
    assert pipelines.left("r#1", "c") is None
    assert pipelines.left("r#1", "a") == Over("node0", (MAIL, PAGES))


def test_nobody_is_told_to_begin_what_was_given_up() -> None:
    pipelines = begun()
    pipelines.give_up("r#1")
    assert list(pipelines.ready(PipelineReady("r#1", "c", PLAN))) == []
    assert pipelines.left("r#1", "c") == Over("node0", (MAIL, PAGES))
