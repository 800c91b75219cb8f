"""Queue orders as numbers: the least goes first."""

import pytest

from kvasir.scheduling.ranks import AGEING, RANKS


def test_each_order_looks_at_its_own() -> None:
    ranks = {name: rank(3.0, 7.0, 0.5) for name, rank in RANKS.items()}
    assert ranks == {"first-come": 3.0, "deadline-first": 7.0, "shortest-first": pytest.approx(3.0 + AGEING * 0.5)}


def test_a_long_prompt_that_has_waited_goes_before_a_short_one() -> None:
    rank = RANKS["shortest-first"]
    long_rank = rank(0.0, 30.0, 2.0)
    assert rank(AGEING * 1.5 - 0.1, 30.0, 0.5) < long_rank
    assert rank(AGEING * 1.5 + 0.1, 30.0, 0.5) > long_rank
