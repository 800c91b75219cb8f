"""The Batcher, one rule a test: an event goes in, commands come out."""

from collections.abc import Sequence

import pytest

from kvasir.core.batcher_commands import (
    BatcherCommand,
    Chunk,
    HandOff,
    NeedPages,
    Preempt,
    Publish,
    Release,
    ReturnPages,
    Starved,
    Step,
)
from kvasir.core.errors import ConfigError, InvariantError
from kvasir.core.events import Cancelled, Event, Extended, InstanceLoad, PagesGranted, StepDone, Submitted, Tick
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.chunking import BatcherConfig

COSTS = FittedCost(
    PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 0.0, 0.0), 0.0, 1e9
)  # 1 ms a prompt token, 10 ms a decode step


class Body:
    """Feeds events, checks invariants, and can grant pages 0, 1, 2, ... as they are asked for."""

    def __init__(self, batcher: Batcher | None = None, *, pages: int = 0):
        self.batcher = batcher or Batcher(config())
        self.next_page = 0
        self.left = pages

    def __call__(self, event: Event, now: float = 0.0) -> list[BatcherCommand]:
        commands = self.batcher.handle(event, now)
        for need in [c for c in commands if isinstance(c, NeedPages)] if self.left else []:
            count = min(need.count, self.left)
            pages = tuple(range(self.next_page, self.next_page + count))
            self.next_page += count
            self.left -= count
            commands = [c for c in commands if c is not need] + self(PagesGranted(pages), now)
        self.batcher.check()
        return commands

    def chunks(self, event: Event, now: float = 0.0) -> list[Chunk]:
        """All that the next step computes, decode tokens first."""
        step = step_of(self(event, now))
        decodes = list(self.batcher.decode_chunks())
        assert len(decodes) == step.batch
        assert sum(chunk.start + 1 for chunk in decodes) == step.context_tokens
        return [*decodes, *step.chunks]

    def lengths(self, event: Event, now: float = 0.0) -> dict[str, int]:
        return {chunk.request_id: chunk.length for chunk in self.chunks(event, now)}


def config(**changes: float | None) -> BatcherConfig:
    values: dict[str, float | None] = {
        "block_tokens": 4,
        "max_batch": 4,
        "max_step_tokens": 16,
        "max_mixed_tokens": 8,
        "ahead_tokens": 2,
        "stash_pages": 8,
    }
    return BatcherConfig(**{**values, **changes})  # type: ignore[arg-type]


def prompt(name: str, tokens: int, *, output: int = 8, hand_off: bool = False, priority: int = 0) -> Submitted:
    return Submitted(name, tokens, 0, tokens + output, (), hand_off, priority)


def step_of(commands: Sequence[BatcherCommand]) -> Step:
    (step,) = [c for c in commands if isinstance(c, Step)]
    return step


def test_a_prompt_waits_for_pages_and_then_runs() -> None:
    body = Body()
    assert body(prompt("a", 6)) == [NeedPages(2 + 4)]  # two blocks and half a stash
    assert body(PagesGranted((7, 8))) == [Step((Chunk("a", 0, 6, (7, 8), samples=True),))]


def test_a_long_prompt_is_computed_in_chunks_and_samples_at_its_end() -> None:
    body = Body(pages=50)
    first = body.chunks(prompt("a", 40))[0]
    second = body.chunks(StepDone())[0]
    third = body.chunks(StepDone())[0]
    assert [(c.start, c.length, len(c.pages), c.samples) for c in (first, second, third)] == [
        (0, 16, 4, False),
        (16, 16, 8, False),
        (32, 8, 10, True),
    ]
    assert third.pages[:4] == first.pages


def test_short_prompts_share_a_step_first_come_first_served() -> None:
    body = Body(pages=50)
    body(prompt("first", 16))
    for name, tokens in (("a", 6), ("b", 5), ("c", 9)):
        body(prompt(name, tokens))
    assert body.lengths(StepDone(("first",))) == {"a": 6, "b": 5, "c": 5}


def test_decode_tokens_come_first_and_prefill_beside_them_is_bounded() -> None:
    body = Body(pages=50)
    body(prompt("old", 4))
    body(prompt("new", 30))
    assert body.lengths(StepDone()) == {"old": 1, "new": 8}


def test_prefill_beside_decode_keeps_the_step_within_its_seconds() -> None:
    body = Body(Batcher(config(max_step_s=0.0135, min_chunk_tokens=2), COSTS), pages=50)
    body(prompt("old", 4))
    body(prompt("new", 30))
    assert body.lengths(StepDone()) == {"old": 1, "new": 3}  # 10 ms of decode leave 3.5 ms


def test_prefill_gets_its_least_chunk_even_when_decode_takes_all_the_time() -> None:
    body = Body(Batcher(config(max_step_s=0.005, min_chunk_tokens=2), COSTS), pages=50)
    body(prompt("old", 4))
    body(prompt("new", 30))
    assert body.lengths(StepDone()) == {"old": 1, "new": 2}


def test_prefill_beside_decode_keeps_within_the_seconds_that_steps_were_seen_to_take() -> None:
    body = Body(Batcher(config(max_step_s=0.04, min_chunk_tokens=2), COSTS), pages=80)
    assert (body.batcher.load().prefill_scale, body.batcher.load().decode_scale) == (None, None)
    body(prompt("old", 4, output=200))
    for _ in range(60):
        body(StepDone(seconds=0.02))  # a decode step takes twice as long as the model says
    assert body.batcher.load().decode_scale == pytest.approx(2.0, rel=0.01)
    body(prompt("new", 64))
    chunk = body.lengths(StepDone(seconds=0.02))
    for _ in range(30):
        if "new" not in chunk:
            break
        chunk = body.lengths(StepDone(seconds=0.02 + 0.003 * chunk["new"]))
    assert body.batcher.load().prefill_scale == pytest.approx(3.0, rel=0.1)
    body(prompt("next", 64))
    assert body.lengths(StepDone(seconds=0.02))["next"] == pytest.approx(6, abs=1)  # 20 ms are left, at 3 ms a token


def test_at_most_max_batch_sequences_run() -> None:
    body = Body(pages=50)
    body(prompt("x", 1))
    for name in "abcde":
        body(prompt(name, 1))
    assert list(body.lengths(StepDone())) == ["x", "a", "b", "c"]
    assert body.batcher.load() == InstanceLoad(
        waiting=2, running=4, waiting_tokens=0, context_tokens=5, free_kv_tokens=body_stash(body)
    )


def body_stash(body: Body) -> int:
    return body.batcher.load().free_kv_tokens


def test_a_block_is_published_when_computed_tokens_fill_it_not_when_sampled_ones_would() -> None:
    body = Body(pages=9)
    body(prompt("a", 7))
    (page0, page1) = body.chunks(StepDone())[0].pages  # computed 7, known 8: block 1 is not full
    commands = body(StepDone())
    assert commands[0] == Publish("a", 1, (page1,))
    assert page0 != page1


def test_a_hand_off_publishes_its_full_blocks_and_gives_the_tail_away() -> None:
    body = Body(pages=9)
    page = body.chunks(prompt("a", 6, hand_off=True))[0].pages
    publish, hand_off, *rest = body(StepDone())
    assert publish == Publish("a", 0, (page[0],))
    assert hand_off == HandOff("a", (page[1],))
    assert not rest
    assert body.batcher.load().running == 0


def test_a_hand_off_without_a_tail_gives_no_pages() -> None:
    body = Body(pages=9)
    body(prompt("a", 8, hand_off=True))
    assert body(StepDone())[1] == HandOff("a", ())


def test_a_hand_off_whose_first_token_ended_it_is_released() -> None:
    body = Body(pages=9)
    body(prompt("a", 6, hand_off=True))
    assert isinstance(body(StepDone(("a",)))[1], Release)


def test_a_handed_off_sequence_decodes_at_once_and_its_tail_stays_the_leases() -> None:
    body = Body(pages=9)
    assert body(Submitted("a", 7, 6, 9, pages=(100, 101))) == [Step((), batch=1, context_tokens=7)]
    assert list(body.batcher.decode_chunks()) == [Chunk("a", 6, 1, (100, 101), samples=True)]
    assert body(StepDone()) == [Step((), batch=1, context_tokens=8)]
    assert list(body.batcher.decode_chunks()) == [Chunk("a", 7, 1, (100, 101), samples=True)]
    assert body(StepDone()) == [Publish("a", 1, (101,)), Release("a", ())]


def test_an_adopted_tail_goes_with_the_lease_and_never_into_the_stash() -> None:
    body = Body(pages=9)
    body(Submitted("a", 7, 6, 9, pages=(100, 101)))
    assert body(StepDone(("a",))) == [Release("a", ())]
    assert body.batcher.load().free_kv_tokens == 0


def test_a_leased_prefix_is_not_computed_or_published_again() -> None:
    body = Body(pages=9)
    chunk = body.chunks(Submitted("a", 10, 8, 20, pages=(100, 101)))[0]
    assert (chunk.start, chunk.length, chunk.pages[:2]) == (8, 2, (100, 101))
    assert not [c for c in body(StepDone()) if isinstance(c, Publish)]


def test_a_sequence_ends_at_max_total_tokens_without_being_told() -> None:
    body = Body(pages=9)
    body(prompt("a", 3, output=2))
    body(StepDone())
    assert Release("a", ()) in body(StepDone())


def test_private_pages_of_a_finished_sequence_fill_the_stash_first() -> None:
    body = Body(Batcher(config(stash_pages=0)), pages=9)
    (page,) = body.chunks(prompt("a", 3))[0].pages
    release = body(StepDone(("a",)))[0]
    assert release == Release("a", (page,))
    body = Body(Batcher(config(stash_pages=4)), pages=1)
    body(prompt("a", 3))
    assert body(StepDone(("a",))) == [Release("a", ())]
    assert body.batcher.load().free_kv_tokens == 4


def test_an_idle_instance_returns_what_its_stash_need_not_hold() -> None:
    body = Body(Batcher(config(stash_pages=2)))
    body(prompt("a", 3))
    body(Cancelled("a"))
    assert body(PagesGranted((5, 6, 7))) == [ReturnPages((7,))]


def test_a_cancelled_sequence_in_the_step_is_released_after_it() -> None:
    body = Body(pages=9)
    body(prompt("a", 6))
    assert body(Cancelled("a")) == []
    assert body(StepDone()) == [Release("a", ())]


def test_a_cancelled_sequence_that_waits_is_released_at_once_and_unknown_ones_are_ignored() -> None:
    body = Body(pages=9)
    body(prompt("a", 6))
    body(prompt("b", 6))
    assert body(Cancelled("b")) == [Release("b", ())]
    assert body(Cancelled("b")) == []


def test_higher_priority_goes_first() -> None:
    body = Body(pages=50)
    body(prompt("first", 16))
    body(prompt("low", 16))
    body(prompt("high", 16, priority=1))
    assert list(body.lengths(StepDone(("first",)))) == ["high"]


def test_the_least_rank_goes_before_a_half_done_prompt_which_keeps_its_pages() -> None:
    body = Body(Batcher(config()), pages=50)
    half_done = body.chunks(Submitted("late", 40, 0, 48, (), rank=9.0))[0]
    body(Submitted("soon", 20, 0, 28, (), rank=5.0))
    assert body.lengths(StepDone()) == {"soon": 16}
    soon, late = body.chunks(StepDone())
    assert (soon.request_id, soon.start, soon.length) == ("soon", 16, 4)
    assert (late.request_id, late.start, late.length) == ("late", 16, 12)
    assert late.pages[:4] == half_done.pages


def test_a_half_done_prompt_goes_on_when_there_is_no_seat_for_a_more_urgent_one() -> None:
    body = Body(Batcher(config(max_batch=1)), pages=50)
    body(Submitted("late", 40, 0, 48, (), rank=9.0))
    body(Submitted("soon", 20, 0, 28, (), rank=5.0))
    assert body.lengths(StepDone()) == {"late": 16}


def repeating(**changes: float | None) -> Body:
    return Body(Batcher(config(max_repeats=100, block_tokens=16, max_step_tokens=64, **changes)), pages=50)


def test_a_decode_step_repeats_until_somebody_ends() -> None:
    body = repeating(ahead_tokens=16)
    body(prompt("a", 3, output=9))
    body(prompt("b", 3, output=6))
    first = step_of(body(StepDone()))  # the prompt of a; now b's, beside a's second token
    assert (first.batch, first.context_tokens, first.repeats, len(first.chunks)) == (1, 4, 1, 1)
    both = step_of(body(StepDone()))
    assert both == Step((), batch=2, context_tokens=5 + 4, repeats=5)  # b's tokens 5 to 9
    commands = body(StepDone(steps=5))
    assert commands[0] == Release("b", ())
    assert commands[1] == Step((), batch=1, context_tokens=10, repeats=2)
    assert body(StepDone(steps=2)) == [Release("a", ())]


def test_a_repeated_step_stops_at_a_full_block_and_where_the_next_page_is_asked_for() -> None:
    body = repeating(ahead_tokens=4)
    body(prompt("a", 6, output=40))
    assert step_of(body(StepDone())).repeats == 12 - 6
    commands = body(StepDone(steps=6))
    assert step_of(commands).repeats == 4
    commands = body(StepDone(steps=4))
    assert isinstance(commands[0], Publish)
    assert [chunk.start for chunk in body.batcher.decode_chunks()] == [16]


def test_a_repeated_step_may_end_early_and_then_goes_on_from_there() -> None:
    body = repeating(ahead_tokens=16)
    body(prompt("a", 3, output=9))
    assert step_of(body(StepDone())).repeats == 8
    body(Submitted("b", 5, 4, 20, pages=(100,)))
    assert step_of(body(StepDone(steps=3))) == Step((), batch=2, context_tokens=7 + 5, repeats=5)
    assert step_of(body(StepDone(steps=0))) == Step((), batch=2, context_tokens=7 + 5, repeats=5)
    assert body(Cancelled("b")) == []
    assert body(StepDone(("a",), steps=2)) == [Release("a", ()), Release("b", ())]


def test_more_passes_than_the_step_had_or_none_of_a_prompt_are_refused() -> None:
    body = repeating()
    body(prompt("a", 3))
    with pytest.raises(InvariantError, match="a step of at most 1 passes"):
        body.batcher.handle(StepDone(steps=0), 0.0)
    with pytest.raises(InvariantError, match="a step of at most 1 passes"):
        body.batcher.handle(StepDone(steps=2), 0.0)


def stage(name: str, tokens: int, available: int | None, *, is_stage: bool = True, rank: float | None = None) -> Submitted:
    return Submitted(name, tokens, 0, tokens + 8, (), False, 0, rank, 0.5, available, is_stage)


def test_a_stage_computes_what_the_stage_before_has_and_leaves_without_a_token() -> None:
    body = Body(pages=50)
    body(prompt("other", 1))
    assert body.lengths(StepDone()) == {"other": 1}
    body(stage("a", 10, 0))
    assert body.lengths(StepDone()) == {"other": 1}
    body(Extended("a", 6))
    _, chunk = body.chunks(StepDone())
    assert chunk == Chunk("a", 0, 6, chunk.pages, samples=False, share=0.5)
    assert body.lengths(StepDone()) == {"other": 1}
    body(Extended("a", 10))
    (chunk,) = body.chunks(StepDone(("other",)))
    assert (chunk.start, chunk.length, chunk.samples) == (6, 4, False)
    assert body(StepDone()) == [Release("a", ())]


def test_the_first_stage_has_all_tokens_and_a_single_one_is_no_decode_token() -> None:
    body = Body(pages=50)
    assert step_of(body(stage("a", 1, None))).batch == 0
    assert body(StepDone()) == [Release("a", ())]


def test_the_last_stage_publishes_draws_and_decodes_once_its_prompt_is_complete() -> None:
    body = Body(pages=50)
    body(stage("a", 5, 4, is_stage=False))
    commands = body(StepDone())
    assert [type(c) for c in commands] == [Publish]
    last = step_of(body(Extended("a", 5))).chunks[0]
    assert (last.start, last.length, last.samples, last.share) == (4, 1, True, 0.5)
    assert body(StepDone())[-1] == Step((), batch=1, context_tokens=6)


def shared(name: str, available: int | None, *, is_stage: bool) -> Submitted:
    """A stage of a prompt of ten tokens, which is given all three pages of it."""
    return Submitted(name, 10, 0, 18, (7, 8, 9), hand_off=True, share=0.5, available=available, is_stage=is_stage)


def test_a_stage_that_is_given_all_pages_asks_for_none_and_returns_none() -> None:
    body = Body()
    assert step_of(body(shared("a", None, is_stage=True))).chunks == (Chunk("a", 0, 10, (7, 8, 9), samples=False, share=0.5),)
    assert body(StepDone()) == [Release("a", ())]


def test_the_last_stage_publishes_the_pages_that_it_was_given_and_hands_them_off() -> None:
    body = Body()
    body(shared("a", 6, is_stage=False))
    assert body(StepDone()) == [Publish("a", 0, (7,))]
    body(Extended("a", 10))
    assert body(StepDone()) == [Publish("a", 1, (8,)), HandOff("a", ())]


def test_nobody_else_may_bring_more_pages_than_are_filled() -> None:
    with pytest.raises(InvariantError, match="pages for exactly 0 tokens"):
        Body()(Submitted("a", 10, 0, 18, (7, 8, 9)))


def test_a_stage_is_expected_to_take_its_share_of_the_layers() -> None:
    body = Body(Batcher(config(), COSTS), pages=50)
    for _ in range(40):
        body(stage("a", 10, None))
        body(StepDone(seconds=0.005))  # 10 ms for all layers
    assert body.batcher.load().prefill_scale == pytest.approx(1.0, rel=0.01)


def test_a_stage_that_waits_for_the_one_before_is_not_short_of_pages() -> None:
    body = Body(Batcher(config(starve_s=5.0)))
    assert body(stage("a", 10, 0)) == []
    body(prompt("b", 6))
    body(PagesGranted(()), now=1.0)
    body(Cancelled("b"), now=2.0)
    assert body(Tick(), now=60.0) == []
    body(PagesGranted(()), now=61.0)
    assert body(Tick(), now=99.0) == []


def test_a_stage_that_waits_gives_its_pages_to_who_can_go_on() -> None:
    body = Body(Batcher(config(stash_pages=0)))
    body(stage("a", 10, 8))
    body(PagesGranted((0, 1)))
    body(StepDone())
    body(prompt("b", 6))
    commands = body(PagesGranted(()))
    assert [c.request_id for c in commands if isinstance(c, Preempt)] == ["a"]


def test_what_a_stage_may_not_be_told_is_refused() -> None:
    body = Body(pages=9)
    body(Extended("unknown", 3))
    body(stage("a", 10, 4))
    for available in (3, 11):
        with pytest.raises(InvariantError, match="available"):
            body(Extended("a", available))
    body(prompt("b", 10))
    with pytest.raises(InvariantError, match="available"):
        body(Extended("b", 10))
    with pytest.raises(InvariantError, match="available"):
        body(stage("c", 10, 11))


def test_a_share_of_the_layers_takes_a_share_of_the_seconds() -> None:
    body = Body(Batcher(config(max_step_s=0.0136, min_chunk_tokens=2), COSTS), pages=50)
    body(prompt("old", 4))
    body(stage("new", 30, None))
    assert body.lengths(StepDone()) == {"old": 1, "new": 7}  # 3.6 ms at half a millisecond a token


def test_prefill_may_be_held_to_what_decode_leaves_of_the_step() -> None:
    def beside_decode(max_step_s: float) -> dict[str, int]:
        body = Body(Batcher(config(max_step_s=max_step_s, min_chunk_tokens=0, max_mixed_tokens=16), COSTS), pages=50)
        body(prompt("old", 4))
        body(prompt("new", 30))
        return body.lengths(StepDone())

    assert beside_decode(0.005) == {"old": 1}
    assert beside_decode(0.0135) == {"old": 1, "new": 3}
    assert beside_decode(1.0) == {"old": 1, "new": 15}  # all of the step's tokens


def test_pages_are_asked_for_before_a_decode_needs_them_and_only_once() -> None:
    body = Body(Batcher(config(stash_pages=0)))
    body(prompt("a", 5))
    body(PagesGranted((0, 1)))
    commands = body(StepDone())  # token 6 of 8 in flight, two ahead fit
    assert [c for c in commands if isinstance(c, NeedPages)] == []
    commands = body(StepDone())
    assert [c for c in commands if isinstance(c, NeedPages)] == [NeedPages(1)]
    assert [c for c in body(StepDone()) if isinstance(c, NeedPages)] == []


def test_a_short_grant_is_not_asked_again_at_once_but_at_the_next_event() -> None:
    body = Body()
    body(prompt("a", 6))
    assert body(PagesGranted(())) == []
    assert [type(c) for c in body(Tick())] == [NeedPages]


def test_without_pages_the_youngest_gives_way_and_the_oldest_goes_on() -> None:
    body = stuck()
    commands = body(PagesGranted(()))
    assert [c.request_id for c in commands if isinstance(c, Preempt)] == ["young"]
    assert isinstance(commands[-1], NeedPages)
    assert body.lengths(PagesGranted((50,))) == {"old": 1}


def test_a_preempted_sequence_is_admitted_again_only_when_somebody_left() -> None:
    body = stuck()
    body(PagesGranted(()))
    body(prompt("young", 9, output=7))
    assert body.lengths(PagesGranted(tuple(range(50, 60)))) == {"old": 1}
    assert body.lengths(StepDone()) == {"old": 1}
    assert body.lengths(StepDone(("old",))) == {"young": 9}


def stuck() -> Body:
    """Two sequences that need a page each, with nothing in flight and a NeedPages on its way."""
    body = Body(Batcher(config(stash_pages=0)))
    body(prompt("old", 4, output=20))
    body(PagesGranted((0, 1)))
    body(prompt("young", 4, output=20))
    body(PagesGranted((2, 3)))
    while any(isinstance(c, Step) for c in body(StepDone())):
        pass
    return body


def test_a_lone_sequence_without_pages_is_given_up_after_a_while() -> None:
    body = Body(Batcher(config(starve_s=5.0)))
    body(prompt("a", 6))
    body(PagesGranted(()), now=1.0)
    assert [type(c) for c in body(Tick(), now=2.0)] == [NeedPages]
    body(PagesGranted(()), now=3.0)
    body(Tick(), now=4.0)
    assert body(PagesGranted(()), now=7.0)[0] == Starved("a", (), 6.0)


def test_a_shortage_that_ended_does_not_count_towards_the_next() -> None:
    body = Body(Batcher(config(starve_s=5.0)))
    body(prompt("a", 6))
    body(PagesGranted(()), now=1.0)
    body(Cancelled("a"), now=2.0)
    body(prompt("b", 6), now=60.0)
    assert not [c for c in body(PagesGranted(()), now=60.0) if isinstance(c, Starved)]


def test_prompts_leave_the_pages_that_decodes_will_need_soon() -> None:
    body = Body(Batcher(config(stash_pages=0)))
    body(prompt("old", 5, output=20))
    body(PagesGranted((0, 1)))
    body(StepDone())
    assert NeedPages(1) in body(StepDone())
    body(PagesGranted((2,)))
    body(prompt("new", 8))
    assert body.lengths(StepDone()) == {"old": 1}
    assert body.lengths(StepDone()) == {"old": 1}
    assert next(body.batcher.decode_chunks()).pages == (0, 1, 2)


def test_while_pages_are_short_an_older_prompt_gets_one_before_a_younger_decode() -> None:
    body = Body(Batcher(config(stash_pages=0)))
    body(Submitted("decode", 6, 5, 30, pages=(100, 101)))
    body(Submitted("prompt", 40, 0, 50, (), hand_off=True, priority=1))
    body(PagesGranted(tuple(range(9))))
    while any(isinstance(c, Step) for c in body(StepDone())):
        pass
    assert body.lengths(PagesGranted((50,))) == {"prompt": 4}


def test_who_leaves_may_end_the_shortage_at_once() -> None:
    body = Body()
    body(prompt("a", 4, output=20))
    body(PagesGranted(tuple(range(4))))
    body(prompt("b", 16, output=20))
    body(PagesGranted(()))
    assert body.lengths(StepDone()) == {"a": 1}
    body(PagesGranted((10, 11)))
    assert body.lengths(StepDone()) == {"a": 1}
    body(PagesGranted(()))
    assert body.lengths(StepDone(("a",))) == {"b": 16}


def test_who_has_no_page_keeps_the_seat() -> None:
    body = Body(Batcher(config(max_batch=3, stash_pages=0)))
    body(Submitted("stalled", 8, 7, 30, pages=(100, 101)))
    assert not [c for c in body(StepDone()) if isinstance(c, Step)]
    body(Submitted("b", 6, 5, 20, pages=(102, 103)))
    body(Submitted("c", 6, 5, 20, pages=(104, 105)))
    body(Submitted("prompt", 8, 5, 20, pages=(106, 107)))
    assert body.lengths(StepDone()) == {"b": 1, "c": 1}


def test_nobody_is_preempted_twice_in_one_shortage() -> None:
    """Else a sequence that leases its prefix again and again would make an endless loop."""
    body = Body()
    body(prompt("old", 6))
    body(Submitted("young", 10, 8, 20, pages=(100, 101)))
    assert isinstance(body(PagesGranted(()))[0], Preempt)
    body(Submitted("young", 10, 8, 20, pages=(100, 101)))
    assert not [c for c in body(PagesGranted(())) if isinstance(c, Preempt)]


def test_what_no_correct_body_sends_is_refused() -> None:
    body = Body(pages=9)
    with pytest.raises(InvariantError, match="none was in flight"):
        body(StepDone())
    body(prompt("a", 4))
    with pytest.raises(InvariantError, match="twice"):
        body(prompt("a", 4))
    with pytest.raises(InvariantError, match="num_computed"):
        body(Submitted("b", 4, 4, 8, (0,)))
    with pytest.raises(InvariantError, match="pages"):
        body(Submitted("b", 9, 8, 20, (0,)))


def test_a_full_decode_batch_must_leave_room_for_prefill_in_a_step() -> None:
    with pytest.raises(ConfigError, match="max_step_tokens: got 4, expected at least 5"):
        config(max_batch=4, max_step_tokens=4)


def test_the_same_events_give_the_same_commands() -> None:
    def run() -> list[BatcherCommand]:
        body = Body(pages=12)
        commands = body(prompt("a", 20)) + body(prompt("b", 7, hand_off=True)) + body(Cancelled("x"))
        for _ in range(12):
            if body.batcher.load().running and any(isinstance(c, Step) for c in commands):
                commands += body(StepDone())
            else:
                break
        return commands

    assert run() == run()


def test_a_step_that_is_full_enough_takes_no_further_prompt() -> None:
    body = Body(Batcher(config(pack_tokens=8)), pages=50)
    body(prompt("now", 4))
    body(prompt("long", 10))
    body(prompt("short", 4))
    assert body.lengths(StepDone(("now",))) == {"long": 10}
    assert body.lengths(StepDone(("long",))) == {"short": 4}


def test_who_joins_the_decodes_does_not_wait_for_prompts_too_where_steps_are_to_be_short() -> None:
    def second(max_step_s: float | None) -> tuple[int, list[str]]:
        body = Body(Batcher(config(max_step_s=max_step_s), COSTS), pages=50)
        body(prompt("a", 4, output=20))
        body(prompt("late", 40))
        body(Submitted("b", 5, 4, 20, (30,)))
        step = step_of(body(StepDone()))
        return step.batch, [chunk.request_id for chunk in step.chunks]

    assert second(None) == (2, ["late"])
    assert second(1.0) == (2, [])


def test_others_chunks_are_no_longer_than_a_turn_of_the_pipeline_that_they_fill_the_time_of() -> None:
    body = Body(Batcher(config()), pages=50)
    body(stage("half", 40, 0))  # half of the layers: 16 tokens of it take as long as 8 of another prompt
    assert body.lengths(prompt("other", 40)) == {"other": 8}
    body(Extended("half", 16))
    assert body.lengths(StepDone()) == {"half": 16}
    assert body.lengths(StepDone()) == {"other": 8}
