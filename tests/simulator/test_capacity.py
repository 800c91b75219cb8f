"""The capacity search on made-up curves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvasir.core.errors import ConfigError
from kvasir.report.slo import Attainment
from kvasir.simulator.capacity import HIGHEST_SPEED, LOWEST_SPEED, find_capacity


def attained(request_share: float, token_share: float | None = None) -> Attainment:
    tokens = request_share if token_share is None else token_share
    return Attainment(10_000, round(10_000 * request_share), 10_000, round(10_000 * tokens))


def passing(holds: Callable[[float], bool]) -> Callable[[float], Attainment]:
    return lambda speed: attained(1.0 if holds(speed) else 0.5)


@pytest.mark.parametrize("edge", [0.02, 0.33, 0.999, 1.0, 1.92, 3.28, 100.0])
def test_an_edge_is_found_within_the_resolution(edge: float) -> None:
    found = find_capacity(passing(lambda speed: speed <= edge)).speed
    assert found is not None
    assert edge / 1.02 <= found <= edge


def test_a_good_guess_needs_few_probes() -> None:
    wide = find_capacity(passing(lambda speed: speed <= 3.28), start=3.0)
    close = find_capacity(passing(lambda speed: speed <= 3.28), start=3.0, stride=1.1)
    assert close.speed == pytest.approx(3.28, rel=0.02)
    assert len(close.probes) < len(wide.probes)


def test_below_the_lowest_speed_nobody_looks() -> None:
    result = find_capacity(passing(lambda speed: speed < 0.4), lowest=0.5)
    assert result.speed is None
    assert min(p.speed for p in result.probes) == 0.5


def test_a_cluster_that_serves_nothing_has_no_capacity() -> None:
    result = find_capacity(passing(lambda speed: False))
    assert result.speed is None
    assert min(p.speed for p in result.probes) == LOWEST_SPEED


def test_a_cluster_that_serves_everything_ends_at_the_highest_speed() -> None:
    result = find_capacity(passing(lambda speed: True))
    assert result.speed == HIGHEST_SPEED
    assert result.is_bound
    assert str(result) == ">= 256x"


def test_an_edge_that_was_seen_is_no_bound() -> None:
    assert not find_capacity(passing(lambda speed: speed <= 2.0)).is_bound


def test_both_shares_count() -> None:
    result = find_capacity(lambda speed: attained(0.99, 0.99 if speed <= 1.5 else 0.5))
    assert result.speed == pytest.approx(1.5, rel=0.02)


def test_a_dip_just_above_the_edge_does_not_end_the_search() -> None:
    result = find_capacity(passing(lambda speed: speed <= 3.0 and not 2.0 < speed < 2.05))
    assert result.speed == pytest.approx(3.0, rel=0.02)


def test_no_speed_is_simulated_twice_and_the_search_is_deterministic() -> None:
    asked: list[float] = []

    def evaluate(speed: float) -> Attainment:
        asked.append(speed)
        return attained(0.95 if speed <= 2.7 else 0.5)

    first = find_capacity(evaluate)
    assert len(asked) == len(set(asked)) == len(first.probes) <= 16
    assert find_capacity(evaluate) == first


def test_the_answer_is_a_speed_that_was_probed_and_passed() -> None:
    result = find_capacity(passing(lambda speed: speed <= 2.7))
    assert result.speed in {p.speed for p in result.probes if p.passes}


def test_a_start_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"capacity: start: got 0, expected"):
        find_capacity(passing(lambda speed: True), start=0.0)
