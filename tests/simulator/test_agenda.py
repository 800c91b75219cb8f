"""Things happen in order of time and, at one time, in the order in which they were planned, however many there are."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.simulator.agenda import NEVER_S, Agenda

PLANS = st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=80)
"""Each when, and whether something happens before the next is planned."""


@pytest.mark.parametrize("span_s", [0.7, 3.0, 100.0])
@given(plans=PLANS)
def test_things_happen_in_order(span_s: float, plans: list[tuple[int, bool]]) -> None:
    agenda, happened = Agenda(span_s), list[tuple[float, int]]()
    expected: list[tuple[float, int]] = []
    waiting: list[tuple[float, int]] = []

    def note(number: int) -> None:
        happened.append((agenda.now, number))

    def step() -> None:
        agenda.step()
        expected.append(waiting.pop(waiting.index(min(waiting))))

    for number, (time, steps) in enumerate(plans):
        agenda.at(time, note, number)
        waiting.append((max(float(time), agenda.now), number))
        assert len(agenda) == len(waiting)
        if steps:
            step()
    while waiting:
        step()
    assert happened == expected


def test_what_is_planned_for_now_comes_after_what_is_planned_for_now_already() -> None:
    agenda, said = Agenda(), list[str]()
    soon: Callable[[str], None] = said.append
    agenda.at(1.0, lambda _: agenda.soon(soon, "third"))
    agenda.at(1.0, soon, "second")
    for _ in range(3):
        agenda.step()
    assert said == ["second", "third"]
    assert agenda.now == 1.0
    with pytest.raises(IndexError):
        agenda.step()


def test_what_is_planned_for_never_does_not_happen() -> None:
    agenda = Agenda()
    agenda.at(NEVER_S, lambda _: None)
    assert len(agenda) == 0
    with pytest.raises(IndexError):
        agenda.step()


def test_what_is_forgotten_does_not_happen() -> None:
    agenda, said = Agenda(), list[str]()
    for time in (0.5, 1.5, 700.0):
        agenda.at(time, said.append, "now")
    agenda.forget()
    assert len(agenda) == 0
    with pytest.raises(IndexError):
        agenda.step()
    agenda.at(2.0, said.append, "then")
    agenda.step()
    assert said == ["then"]
