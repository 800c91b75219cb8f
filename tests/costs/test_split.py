"""What splitting a prefill into steps costs."""

import pytest

from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.costs.hardware import HARDWARE
from kvasir.costs.quick import quick
from kvasir.costs.roofline import LLAMA3_70B, RooflineCost


@pytest.mark.parametrize("name", sorted(HARDWARE))
def test_a_further_step_costs_its_overhead_and_no_further_reading_of_weights(name: str) -> None:
    """Where 512 tokens fill the accelerator; where they do not, at most what a step of one token takes."""
    hardware = HARDWARE[name]
    costs = RooflineCost(LLAMA3_70B, hardware)
    assert hardware.prefill_overhead_s * (1 - 1e-6) <= quick(costs).split_s() <= costs.prefill_s(1, 0)
    if LLAMA3_70B.prefill_flops(512, 0) / hardware.effective_flops > costs.prefill_s(1, 512) - hardware.prefill_overhead_s:
        assert quick(costs).split_s() == pytest.approx(hardware.prefill_overhead_s)


def test_a_fitted_cost_whose_parts_do_not_add_up_gives_no_more_than_a_step_of_one_token_takes() -> None:
    decode = DecodeFit(5e-3, 0.0, 0.0)
    exact = FittedCost(PrefillFit(2e-3, 1e-4, 2e-8, 1e-8), decode, 0.0, 1e9)
    assert quick(exact).split_s() == pytest.approx(2e-3)
    for per_pair_s in (0.0, 1e-6):
        fitted = FittedCost(PrefillFit(2e-3, 1e-4, per_pair_s, 1e-8), decode, 0.0, 1e9)
        assert 0.0 <= quick(fitted).split_s() <= fitted.prefill_s(1, 0)
