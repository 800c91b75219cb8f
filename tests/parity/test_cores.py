"""Instances of one node on the same cores, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvasir.scheduling.strategy import strategy
from kvasir.simulator.agenda import Agenda
from kvasir.simulator.cores import Cores
from kvasir.workload.trace import Trace
from tests.parity.both import Case, conversations, simulated


def ends(low_share: float, *steps: tuple[str, float, float, bool], normal_share: float = 1.0) -> dict[str, float]:
    """When each (name, start, seconds, at low priority) ends."""
    agenda, found = Agenda(), {}
    cores = Cores(agenda, low_share, normal_share)

    def end(name: object) -> None:
        found[str(name)] = agenda.now

    def begin(step: object) -> None:
        assert isinstance(step, tuple)
        name, _, seconds, is_low = step
        cores.run(name, seconds, is_low=is_low, then=end, argument=name)

    for step in steps:
        agenda.at(step[1], begin, step)
    while len(agenda):
        agenda.step()
    return found


def test_a_step_alone_takes_its_time() -> None:
    assert ends(0.25, ("a", 1.0, 2.0, True)) == {"a": pytest.approx(3.0)}


def test_steps_of_equal_priority_share_evenly() -> None:
    # each gets half from 1 to 3, by when b is done; a has 1 of 3 left
    assert ends(0.25, ("a", 0.0, 3.0, False), ("b", 1.0, 1.0, False)) == {"b": pytest.approx(3.0), "a": pytest.approx(4.0)}


def test_low_priority_gets_its_share_beside_a_step_at_normal_priority() -> None:
    # 1 s alone, 2 s at a quarter, so 1.5 of 4 are done at 3; the other is not slowed down
    steps = ("prefill", 0.0, 4.0, True), ("decode", 1.0, 2.0, False)
    assert ends(0.25, *steps) == {"decode": pytest.approx(3.0), "prefill": pytest.approx(5.5)}


def test_low_priority_may_get_nothing() -> None:
    steps = ("prefill", 0.0, 2.0, True), ("decode", 1.0, 2.0, False)
    assert ends(0.0, *steps) == {"decode": pytest.approx(3.0), "prefill": pytest.approx(4.0)}


def test_normal_priority_is_slower_beside_a_step_at_low_priority() -> None:
    # decode needs 4 s for 2 at half speed; prefill has a quarter of them, and then the cores for what is left of its 3 s
    steps = ("prefill", 0.0, 3.0, True), ("decode", 1.0, 2.0, False)
    assert ends(0.25, *steps, normal_share=0.5) == {"decode": pytest.approx(5.0), "prefill": pytest.approx(6.0)}


def test_a_step_of_a_process_that_died_does_not_end() -> None:
    agenda, ended = Agenda(), list[object]()
    cores = Cores(agenda, 0.25)
    cores.run("a", 2.0, is_low=False, then=ended.append, argument="a")
    cores.run("b", 2.0, is_low=False, then=lambda name: ended.append((name, agenda.now)), argument="b")
    cores.stop("a")
    while len(agenda):
        agenda.step()
    assert ended == [("b", pytest.approx(2.0))]


def test_an_instance_that_never_shares_is_as_fast_on_shared_cores() -> None:
    case, trace = Case("1M", strategy("mooncake").with_parts(admission="off")), conversations(seed=5, count=60, rate=20.0)
    assert first_waits(replace(case, low_share=0.2), trace) == pytest.approx(first_waits(case, trace), abs=1e-6)


def test_decoding_slows_prefill_down_on_shared_cores() -> None:
    case, trace = Case("1P1D", strategy("mooncake").with_parts(admission="off")), conversations(seed=5, count=60, rate=20.0)
    assert sum(first_waits(replace(case, low_share=0.2), trace)) > 1.2 * sum(first_waits(case, trace))


def first_waits(case: Case, trace: Trace) -> list[float]:
    """The waits that the conductor saw."""
    return [decision.candidates[0].wait_s for decision in simulated(case, trace, max_repeats=1)]
