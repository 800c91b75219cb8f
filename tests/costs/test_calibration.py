"""Scales follow what is measured, phase by phase, and are not thrown off by a step that stood still."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvasir.costs.calibration import MOST, Calibration
from kvasir.costs.quick import QuickCosts, quick
from kvasir.costs.roofline import reference_cost


class Engine:
    """Takes `prefill` and `decode` times as long as the model says, and tells the calibration after each step."""

    def __init__(self, prefill: float, decode: float):
        self.truth = quick(reference_cost())
        self.prefill, self.decode = prefill, decode
        self.costs: QuickCosts = quick(reference_cost())
        self.calibration = Calibration(self.costs)

    def step(self, new_tokens: int, batch: int, stall: float = 1.0) -> None:
        seconds = self.prefill * self.truth.prefill_s(new_tokens, 0) + self.decode * self.truth.decode_step_s(
            batch, batch * 900
        )
        self.calibration.saw(self.costs.prefill_s(new_tokens, 0), self.costs.decode_step_s(batch, batch * 900), seconds * stall)

    @property
    def scales(self) -> tuple[float | None, float | None]:
        return self.calibration.prefill_scale, self.calibration.decode_scale


def test_without_measurements_nothing_is_said_and_nothing_changes() -> None:
    engine = Engine(3.0, 3.0)
    assert engine.scales == (None, None)
    assert engine.costs.prefill_s(5000, 0) == engine.truth.prefill_s(5000, 0)


def test_an_engine_that_is_as_predicted_keeps_the_scale_of_one() -> None:
    engine = Engine(1.0, 1.0)
    for n in range(300):
        engine.step(512 if n % 3 else 0, n % 7 + 1)
    assert engine.scales == (1.0, 1.0)


@given(st.floats(0.5, 4.0), st.floats(0.5, 4.0))
def test_each_phase_alone_comes_to_its_own_ratio(prefill: float, decode: float) -> None:
    engine = Engine(prefill, decode)
    for _ in range(400):
        engine.step(2048, 0)
        engine.step(0, 16)
    got_prefill, got_decode = engine.scales
    assert got_prefill == pytest.approx(prefill, rel=0.15, abs=0.02)
    assert got_decode == pytest.approx(decode, rel=0.15, abs=0.02)


@given(st.floats(0.2, 5.0), st.floats(0.2, 5.0))
def test_mixed_steps_of_different_make_up_tell_the_phases_apart(prefill: float, decode: float) -> None:
    engine = Engine(prefill, decode)
    for n in range(600):
        engine.step((64, 512, 1024)[n % 3], (1, 32)[n % 2])
    got_prefill, got_decode = engine.scales
    assert got_prefill == pytest.approx(prefill, rel=0.2, abs=0.02)
    assert got_decode == pytest.approx(decode, rel=0.2, abs=0.02)


def test_prefill_alone_says_nothing_of_decode() -> None:
    engine = Engine(4.0, 9.0)
    for _ in range(100):
        engine.step(2048, 0)
    assert engine.calibration.prefill_scale == pytest.approx(4.0, rel=0.1)
    assert engine.calibration.decode_scale is None
    assert engine.costs.decode_scale == 1.0


def test_a_machine_that_halves_its_speed_is_followed_within_seconds() -> None:
    engine = Engine(1.0, 1.0)
    for _ in range(100):
        engine.step(2048, 0)
    engine.prefill, taken_s = 2.0, 0.0
    while taken_s < 15.0:
        engine.step(2048, 0)
        taken_s += 2.0 * engine.truth.prefill_s(2048, 0)
    assert engine.calibration.prefill_scale == pytest.approx(2.0, rel=0.1)


def test_a_step_that_stood_still_for_minutes_counts_for_little() -> None:
    engine = Engine(1.0, 1.0)
    for _ in range(100):
        engine.step(2048, 0)
    engine.step(2048, 0, stall=1000.0)
    assert engine.costs.prefill_scale < 2.0


@given(st.lists(st.tuples(st.floats(0.0, 1e3), st.floats(0.0, 1e3), st.floats(allow_nan=True, allow_infinity=True))))
@example([(0.0, 1.0, 3.0), (0.0, 5e-324, 1.0)])  # nothing, once it is scaled back
def test_whatever_it_is_told_the_scales_stay_within_bounds(steps: list[tuple[float, float, float]]) -> None:
    costs = quick(reference_cost())
    calibration = Calibration(costs)
    for prefill_s, decode_s, seconds in steps:
        calibration.saw(prefill_s, decode_s, seconds)
        for scale in (costs.prefill_scale, costs.decode_scale):
            assert 1.0 / MOST <= scale <= MOST
