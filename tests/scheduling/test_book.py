"""The book of an instance's prefills against a naive list of them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.scheduling.book import PrefillBook


def book(*entries: tuple[str, float, float, float]) -> PrefillBook:
    """(id, seconds, rank, due), all sent at 0."""
    made = PrefillBook()
    for name, seconds, rank, due_s in entries:
        made.sent(name, seconds=seconds, tokens=100, now=0.0, rank=rank, due_s=due_s)
    made.check()
    return made


def test_a_request_waits_for_what_goes_before_it_only() -> None:
    queue = book(("a", 1.0, 5.0, 9.0), ("b", 2.0, 8.0, 9.0))
    assert queue.wait_s(0.0) == pytest.approx(3.0)
    assert queue.wait_s(0.0, rank=6.0) == pytest.approx(1.0)
    assert queue.wait_s(0.0, rank=1.0) == 0.0


def test_equal_ranks_go_in_the_order_sent() -> None:
    queue = book(("a", 1.0, 5.0, 9.0))
    assert queue.wait_s(0.0, rank=5.0) == pytest.approx(1.0)


def test_time_works_the_queue_off_at_its_pace() -> None:
    queue = book(("a", 1.0, 0.0, 9.0), ("b", 1.0, 1.0, 9.0))
    assert queue.wait_s(0.5) == pytest.approx(1.5)
    queue.at_pace(0.5, 0.5)
    assert queue.wait_s(0.5) == pytest.approx(3.0)
    assert queue.wait_s(1.0) == pytest.approx(2.5)
    queue.check()


def test_what_comes_later_can_be_put_off_until_the_tightest_is_due() -> None:
    queue = book(("a", 1.0, 1.0, 2.0), ("b", 1.0, 3.0, 5.0), ("c", 1.0, 4.0, 3.5))
    assert queue.spare_s(0.0, rank=2.0) == pytest.approx(0.5)  # c is done at 3.0 and due at 3.5
    assert queue.spare_s(0.0, rank=0.0) == pytest.approx(0.5)
    assert queue.spare_s(0.0, rank=9.0) == math.inf


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 5.0), st.floats(0.0, 20.0)), min_size=1, max_size=12),
    st.lists(st.integers(0, 11), max_size=6),
    st.floats(0.0, 20.0),
)
def test_waits_are_those_of_a_naive_list(sent: list[tuple[float, float]], gone: list[int], rank: float) -> None:
    queue = PrefillBook()
    naive = {}
    for index, (seconds, place) in enumerate(sent):
        queue.sent(str(index), seconds=seconds, tokens=1, now=0.0, rank=place)
        naive[str(index)] = (seconds, place)
    for index in gone:
        queue.left(str(index), 0.0)
        naive.pop(str(index), None)
    queue.check()
    assert len(queue) == len(naive)
    assert queue.wait_s(0.0) == pytest.approx(sum(seconds for seconds, _ in naive.values()), abs=1e-9)
    before = sum(seconds for seconds, place in naive.values() if place <= rank)
    assert queue.wait_s(0.0, rank) == pytest.approx(before, abs=1e-9)


def test_when_everything_takes_longer_so_does_what_waits_already() -> None:
    queue = book(("a", 1.0, 0.0, 9.0), ("b", 1.0, 1.0, 9.0))
    queue.reported(100, sent_before_s=0.0, now=0.0)  # half of it is done
    assert queue.wait_s(0.0) == pytest.approx(1.0)
    queue.rescale(3.0)
    assert queue.wait_s(0.0) == pytest.approx(3.0)
    queue.check()
