"""Roofline formulas against values worked out by hand."""

import pytest

from kvasir.core.errors import ConfigError
from kvasir.costs.hardware import HARDWARE, Hardware, hardware
from kvasir.costs.roofline import LLAMA3_70B, RooflineCost, reference_cost
from kvasir.costs.shape import ModelShape

TINY = ModelShape(
    num_layers=2, hidden=8, num_heads=2, num_kv_heads=1, head_dim=4, intermediate=16, vocab=10, num_params=1000, dtype_bytes=2
)
NODE = Hardware(
    name="round",
    devices=2,
    flops=1e6,
    memory_bandwidth=1e5,
    memory_bytes=10**6,
    network_bandwidth=1e4,
    source="invented",
    flops_efficiency=0.5,
    memory_efficiency=0.5,
    network_latency_s=0.5,
    prefill_overhead_s=1.0,
    step_overhead_s=2.0,
)
COSTS = RooflineCost(TINY, NODE)


def test_a_long_prefill_is_bound_by_arithmetic() -> None:
    flops = 2 * 1000 * 100 + 4 * 2 * 4 * 2 * (100 * 50 + 100 * 100 / 2)  # 200,000 + 640,000
    assert COSTS.prefill_s(100, 50) == pytest.approx(1.0 + flops / 1e6)


def test_a_short_prefill_still_reads_all_weights() -> None:
    num_bytes = 2000 + (1 + 9) * 32  # KV of a token: 2 x 2 layers x 1 head x 4 x 2 bytes
    assert COSTS.prefill_s(1, 9) == pytest.approx(1.0 + num_bytes / 1e5)


def test_a_decode_step_reads_weights_and_kv() -> None:
    assert COSTS.decode_step_s(1, 100) == pytest.approx(2.0 + (2000 + 100 * 32) / 1e5)


def test_a_huge_decode_batch_is_bound_by_arithmetic() -> None:
    assert COSTS.decode_step_s(1000, 1000) == pytest.approx(2.0 + (2 * 1000 * 1000 + 64 * 1000) / 1e6)


def test_a_transfer_takes_latency_and_bandwidth() -> None:
    assert COSTS.transfer_s(10_000) == pytest.approx(1.5)


def test_nothing_takes_no_time() -> None:
    assert COSTS.prefill_s(0, 10) == COSTS.decode_step_s(0, 0) == COSTS.transfer_s(0) == 0.0


def test_the_reference_model_is_reproduced() -> None:
    """LLaMA3-70B on 8 x 312 TFLOP/s at 50 % and 8 x 2.0 TB/s at 75 %, 320 KiB a token, 80 GB/s."""
    reference = reference_cost()
    assert LLAMA3_70B.kv_bytes_per_token == 320 * 1024
    n, p = 8192, 4096
    flops = 2 * 70e9 * n + 4 * 8192 * 80 * (n * p + n * n / 2)
    assert reference.prefill_s(n, p) == pytest.approx(0.010 + flops / (8 * 312e12 * 0.5))
    assert reference.decode_step_s(16, 100_000) == pytest.approx(0.008 + (140e9 + 100_000 * 327_680) / (8 * 2.0e12 * 0.75))
    assert reference.transfer_s(8 * 10**9) == pytest.approx(0.1)


def test_more_work_never_costs_less() -> None:
    for name in HARDWARE:
        costs = RooflineCost(LLAMA3_70B, hardware(name))
        assert costs.prefill_s(64, 0) <= costs.prefill_s(65, 0) <= costs.prefill_s(65, 64)
        assert costs.decode_step_s(1, 10) <= costs.decode_step_s(2, 10) <= costs.decode_step_s(2, 20)


def test_every_figure_names_its_source_and_its_own_name() -> None:
    assert all(node.source and node.name == name for name, node in HARDWARE.items())


def test_unknown_hardware_says_what_is_known() -> None:
    with pytest.raises(ConfigError, match="a800, h800, h200, cpu-laptop"):
        hardware("abacus")
