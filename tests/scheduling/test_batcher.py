"""The Batcher, one rule a test: an event goes in, commands come out."""

from collections.abc import Sequence

import pytest

from kvasir.core.commands import (
    Chunk,
    Command,
    FilledBlock,
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
from kvasir.core.events import Cancelled, Event, InstanceLoad, PagesGranted, StepDone, Submitted, Tick
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.chunking import BatcherConfig
from kvasir.scheduling.queue_order import aged_shortest_first

COSTS = FittedCost(
    PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 0.0, 0.0), 0.0, 1e9
)  # 1 ms a prompt token, 10 ms a decode step


class Body:
    """Feeds events, checks invariants, and can grant pages 0, 1, 2, ... as they are asked for."""

    def __init__(self, batcher: Batcher | None = None, *, pages: int = 0):
        self.batcher = batcher or Batcher(config())
        self.next_page = 0
        self.left = pages

    def __call__(self, event: Event, now: float = 0.0) -> list[Command]:
        commands = self.batcher.handle(event, now)
        for need in [c for c in commands if isinstance(c, NeedPages)] if self.left else []:
            count = min(need.count, self.left)
            pages = tuple(range(self.next_page, self.next_page + count))
            self.next_page += count
            self.left -= count
            commands = [c for c in commands if c is not need] + self(PagesGranted(pages), now)
        self.batcher.check()
        return commands


def config(**changes: float) -> BatcherConfig:
    values = {
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


def step_of(commands: Sequence[Command]) -> Step:
    (step,) = [c for c in commands if isinstance(c, Step)]
    return step


def lengths(commands: Sequence[Command]) -> dict[str, int]:
    return {chunk.request_id: chunk.length for chunk in step_of(commands).chunks}


def test_a_prompt_waits_for_pages_and_then_runs() -> None:
    body = Body()
    assert body(prompt("a", 6)) == [NeedPages(2 + 4)]  # two blocks and half a stash
    assert body(PagesGranted((7, 8))) == [Step((Chunk("a", 0, 6, (7, 8), samples=True),))]


def test_a_long_prompt_is_computed_in_chunks_and_samples_at_its_end() -> None:
    body = Body(pages=50)
    first = step_of(body(prompt("a", 40))).chunks[0]
    second = step_of(body(StepDone())).chunks[0]
    third = step_of(body(StepDone())).chunks[0]
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
    assert lengths(body(StepDone(("first",)))) == {"a": 6, "b": 5, "c": 5}


def test_decode_tokens_come_first_and_prefill_beside_them_is_bounded() -> None:
    body = Body(pages=50)
    body(prompt("old", 4))
    body(prompt("new", 30))
    assert lengths(body(StepDone())) == {"old": 1, "new": 8}


def test_prefill_beside_decode_keeps_the_step_within_its_seconds() -> None:
    body = Body(Batcher(config(max_step_s=0.0135, min_chunk_tokens=2), COSTS), pages=50)
    body(prompt("old", 4))
    body(prompt("new", 30))
    assert lengths(body(StepDone())) == {"old": 1, "new": 3}  # 10 ms of decode leave 3.5 ms


def test_prefill_gets_its_least_chunk_even_when_decode_takes_all_the_time() -> None:
    body = Body(Batcher(config(max_step_s=0.005, min_chunk_tokens=2), COSTS), pages=50)
    body(prompt("old", 4))
    body(prompt("new", 30))
    assert lengths(body(StepDone())) == {"old": 1, "new": 2}


def test_at_most_max_batch_sequences_run() -> None:
    body = Body(pages=50)
    body(prompt("x", 1))
    for name in "abcde":
        body(prompt(name, 1))
    assert list(lengths(body(StepDone()))) == ["x", "a", "b", "c"]
    assert body.batcher.load() == InstanceLoad(
        waiting=2, running=4, waiting_tokens=0, context_tokens=5, free_kv_tokens=body_stash(body)
    )


def body_stash(body: Body) -> int:
    return body.batcher.load().free_kv_tokens


def test_a_block_is_published_when_computed_tokens_fill_it_not_when_sampled_ones_would() -> None:
    body = Body(pages=9)
    body(prompt("a", 7))
    (page0, page1) = step_of(body(StepDone())).chunks[0].pages  # computed 7, known 8: block 1 is not full
    commands = body(StepDone())
    assert commands[0] == Publish("a", (FilledBlock(1, page1),))
    assert page0 != page1


def test_a_hand_off_publishes_its_full_blocks_and_gives_the_tail_away() -> None:
    body = Body(pages=9)
    page = step_of(body(prompt("a", 6, hand_off=True))).chunks[0].pages
    publish, hand_off, *rest = body(StepDone())
    assert publish == Publish("a", (FilledBlock(0, page[0]),))
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
    assert body(Submitted("a", 7, 6, 9, pages=(100, 101))) == [Step((Chunk("a", 6, 1, (100, 101), samples=True),))]
    assert body(StepDone()) == [Step((Chunk("a", 7, 1, (100, 101), samples=True),))]
    assert body(StepDone()) == [Publish("a", (FilledBlock(1, 101),)), Release("a", ())]


def test_an_adopted_tail_goes_with_the_lease_and_never_into_the_stash() -> None:
    body = Body(pages=9)
    body(Submitted("a", 7, 6, 9, pages=(100, 101)))
    assert body(StepDone(("a",))) == [Release("a", ())]
    assert body.batcher.load().free_kv_tokens == 0


def test_a_leased_prefix_is_not_computed_or_published_again() -> None:
    body = Body(pages=9)
    chunk = step_of(body(Submitted("a", 10, 8, 20, pages=(100, 101)))).chunks[0]
    assert (chunk.start, chunk.length, chunk.pages[:2]) == (8, 2, (100, 101))
    assert not [c for c in body(StepDone()) if isinstance(c, Publish)]


def test_a_sequence_ends_at_max_total_tokens_without_being_told() -> None:
    body = Body(pages=9)
    body(prompt("a", 3, output=2))
    body(StepDone())
    assert Release("a", ()) in body(StepDone())


def test_private_pages_of_a_finished_sequence_fill_the_stash_first() -> None:
    body = Body(Batcher(config(stash_pages=0)), pages=9)
    (page,) = step_of(body(prompt("a", 3))).chunks[0].pages
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
    assert list(lengths(body(StepDone(("first",))))) == ["high"]


def test_aged_shortest_first_lets_a_short_prompt_pass_until_the_long_one_has_aged() -> None:
    def second_step(later: float) -> str:
        body = Body(Batcher(config(), order=aged_shortest_first(1.0)), pages=50)
        body(prompt("first", 16))
        body(prompt("long", 16), now=0.0)
        body(prompt("short", 4), now=later)
        return next(iter(lengths(body(StepDone(("first",)), now=later))))

    assert second_step(later=1.0) == "short"
    assert second_step(later=20.0) == "long"


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
    assert lengths(body(PagesGranted((50,)))) == {"old": 1}


def test_a_preempted_sequence_is_admitted_again_only_when_somebody_left() -> None:
    body = stuck()
    body(PagesGranted(()))
    body(prompt("young", 9, output=7))
    assert lengths(body(PagesGranted(tuple(range(50, 60))))) == {"old": 1}
    assert lengths(body(StepDone())) == {"old": 1}
    assert lengths(body(StepDone(("old",)))) == {"young": 9}


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
    with pytest.raises(InvariantError, match="without a step"):
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
    def run() -> list[Command]:
        body = Body(pages=12)
        commands = body(prompt("a", 20)) + body(prompt("b", 7, hand_off=True)) + body(Cancelled("x"))
        for _ in range(12):
            if body.batcher.load().running and any(isinstance(c, Step) for c in commands):
                commands += body(StepDone())
            else:
                break
        return commands

    assert run() == run()
