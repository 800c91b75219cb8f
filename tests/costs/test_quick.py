"""A quick cost model says what the one behind it says, to the last bit: parity and recorded logs depend on it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.costs.hardware import HARDWARE
from kvasir.costs.model import CostModel
from kvasir.costs.quick import quick
from kvasir.costs.roofline import RooflineCost, reference_cost
from kvasir.costs.shapes import SHAPES

FITTED = FittedCost(PrefillFit(3.1e-3, 7.7e-5, 1.3e-9, 2.9e-10), DecodeFit(2.3e-3, 1.1e-4, 3.3e-8), 60e-6, 3.9e9)
MODELS: dict[str, CostModel] = {
    **{f"{node}, {shape}": RooflineCost(SHAPES[shape], HARDWARE[node]) for node in HARDWARE for shape in SHAPES},
    "reference": reference_cost(),
    "fitted": FITTED,
    "without overheads": replace(reference_cost(), hardware=replace(HARDWARE["a800"], prefill_overhead_s=0, step_overhead_s=0)),
}
TOKENS = st.integers(-1, 300_000)


@pytest.mark.parametrize("name", MODELS)
@given(some=TOKENS, others=TOKENS, num_bytes=st.integers(-1, 1 << 42))
def test_answers_are_the_same(name: str, some: int, others: int, num_bytes: int) -> None:
    costs = MODELS[name]
    fast, cached = quick(costs), max(0, others)
    assert fast is not costs
    assert fast.prefill_s(some, cached) == costs.prefill_s(some, cached)
    assert fast.decode_step_s(some, cached) == costs.decode_step_s(some, cached)
    assert fast.transfer_s(num_bytes) == costs.transfer_s(num_bytes)
    columns = np.array([1, max(1, some)]), np.array([0, cached])
    assert fast.decode_steps_s(*columns).tolist() == costs.decode_steps_s(*columns).tolist()


def test_what_is_neither_is_left_as_it_is() -> None:
    fast = quick(FITTED)
    assert quick(fast) is fast
