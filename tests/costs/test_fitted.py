"""Fitted costs: what went in comes out, noise and impossible coefficients are survived."""

from random import Random

import pytest

from kvasir.core.errors import ConfigError
from kvasir.costs.fitted import DecodeFit, DecodeSample, FittedCost, PrefillFit, PrefillSample, fit_decode, fit_prefill

TRUE = FittedCost(
    PrefillFit(2e-3, 2e-4, 1e-8, 2e-8), DecodeFit(5e-3, 3e-4, 2e-7), transfer_latency_s=1e-4, transfer_bandwidth=1e9
)
SIZES = [(n, p) for n in (1, 16, 128, 512, 2048, 8192) for p in (0, 256, 4096)]
BATCHES = [(b, b * c) for b in (1, 4, 16, 64) for c in (128, 2048)]


def test_exact_samples_give_the_coefficients_back() -> None:
    fit = fit_prefill([PrefillSample(n, p, TRUE.prefill_s(n, p)) for n, p in SIZES])
    assert (fit.base_s, fit.per_token_s, fit.per_pair_s, fit.per_square_s) == pytest.approx((2e-3, 2e-4, 1e-8, 2e-8), rel=1e-6)
    assert fit.error_p90 < 1e-6
    assert fit.num_samples == len(SIZES)
    decode = fit_decode([DecodeSample(b, c, TRUE.decode_step_s(b, c)) for b, c in BATCHES])
    assert (decode.base_s, decode.per_sequence_s, decode.per_context_token_s) == pytest.approx((5e-3, 3e-4, 2e-7), rel=1e-6)


def test_noise_of_ten_percent_is_reported_as_such() -> None:
    rng = Random(3)
    fit = fit_prefill([PrefillSample(n, p, TRUE.prefill_s(n, p) * rng.uniform(0.9, 1.1)) for n, p in SIZES * 3])
    assert 0.01 < fit.error_p50 < fit.error_p90 < 0.15


def test_coefficients_are_never_negative_so_more_work_never_costs_less() -> None:
    fit = fit_decode([DecodeSample(b, b * 100, 1.0 / b) for b in (1, 2, 4, 8)])
    assert min(fit.base_s, fit.per_sequence_s, fit.per_context_token_s) >= 0
    assert fit.base_s > 0


def test_small_and_large_prompts_weigh_the_same() -> None:
    """A second of error on a prompt of minutes must not cost ten times a short prompt's time."""
    samples = [PrefillSample(n, 0, TRUE.prefill_s(n, 0) * (1.2 if n > 4000 else 1.0)) for n, _ in SIZES]
    fit = FittedCost(fit_prefill(samples), TRUE.decode, 0.0, 1e9)
    assert fit.prefill_s(16, 0) == pytest.approx(TRUE.prefill_s(16, 0), rel=0.1)


def test_too_few_samples_or_no_time_are_errors() -> None:
    with pytest.raises(ConfigError, match="4 coefficients to 3 samples"):
        fit_prefill([PrefillSample(1, 0, 1.0)] * 3)
    with pytest.raises(ConfigError, match="positive"):
        fit_decode([DecodeSample(1, 1, 0.0)] * 3)


def test_a_profile_survives_its_file() -> None:
    assert FittedCost.from_json(TRUE.to_json()) == TRUE
    with pytest.raises(ConfigError, match="kvasir profile"):
        FittedCost.from_json(b"{}")


def test_nothing_takes_no_time() -> None:
    assert TRUE.prefill_s(0, 5) == TRUE.decode_step_s(0, 0) == TRUE.transfer_s(0) == 0.0
    assert TRUE.transfer_s(10**9) == pytest.approx(1.0001)
