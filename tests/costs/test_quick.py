"""A quick cost model says what the one behind it says, to the last bit: parity and recorded logs depend on it."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.costs.hardware import HARDWARE
from kvasir.costs.model import CostModel, Counts
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


def test_what_is_quick_already_is_left_as_it_is() -> None:
    fast = quick(FITTED)
    assert quick(fast) is fast


class Constant:
    """A cost model that this package does not know."""

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        return 1.5

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        return 0.25

    def decode_steps_s(self, batch: Counts, context_tokens: Counts) -> npt.NDArray[np.float64]:
        return np.full(len(batch), 0.25)

    def transfer_s(self, num_bytes: int) -> float:
        return 0.125


def test_any_cost_model_can_be_asked_so() -> None:
    fast = quick(Constant())
    assert (fast.prefill_s(9, 1), fast.decode_step_s(2, 8), fast.transfer_s(4)) == (1.5, 0.25, 0.125)
    assert fast.decode_steps_s(np.array([1, 2]), np.array([8, 8])).tolist() == [0.25, 0.25]
