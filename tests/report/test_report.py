"""Timelines, SLO attainment, summaries and tables of hand-made runs."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.errors import ConfigError
from kvasir.core.request import Slo
from kvasir.report.slo import Attainment, ScaledSlo, attainment, capacity, is_effective, ttft_limit_s
from kvasir.report.summary import summarise
from kvasir.report.table import render
from kvasir.report.timeline import RequestRecord, Status

GOOD = RequestRecord("a", 1.0, 1000, output_tokens=3, cached_tokens=400, token_times_s=(2.0, 2.05, 2.1))
REJECTED = RequestRecord("r", 2.0, 5000, status=Status.REJECTED, reason="ttft_slo")
FAILED = RequestRecord("f", 3.0, 100, token_times_s=(3.5,), output_tokens=1, status=Status.FAILED, reason="disconnected")
ABORTED = RequestRecord("x", 4.0, 100, status=Status.ABORTED, reason="interrupted")


def with_gaps(*gaps_s: float) -> RequestRecord:
    times = [1.0]
    for gap in gaps_s:
        times.append(times[-1] + gap)
    return RequestRecord("g", 0.0, 10, output_tokens=len(times), token_times_s=tuple(times))


class TestTimeline:
    def test_latencies_follow_from_the_token_times(self) -> None:
        assert GOOD.ttft_s == pytest.approx(1.0)
        assert GOOD.e2e_s == pytest.approx(1.1)
        assert GOOD.tpot_s == pytest.approx(0.05)
        assert GOOD.gaps_s == pytest.approx([0.05, 0.05])

    def test_tbt_is_the_mean_of_the_longest_tenth_of_the_gaps(self) -> None:
        assert with_gaps(*[0.1] * 18, 0.5, 0.3).tbt_s == pytest.approx(0.4)

    def test_tbt_looks_at_one_gap_more_as_soon_as_a_tenth_exceeds_whole_gaps(self) -> None:
        assert with_gaps(*[0.1] * 9, 0.5).tbt_s == pytest.approx(0.5)
        assert with_gaps(*[0.1] * 10, 0.5).tbt_s == pytest.approx(0.3)

    def test_tbt_looks_at_one_gap_at_least(self) -> None:
        assert with_gaps(0.1, 0.7).tbt_s == pytest.approx(0.7)

    @given(st.lists(st.floats(0, 10), min_size=1, max_size=60))
    def test_tbt_lies_between_the_mean_and_the_longest_gap(self, gaps: list[float]) -> None:
        tbt_s = with_gaps(*gaps).tbt_s
        assert tbt_s is not None
        assert sum(gaps) / len(gaps) - 1e-6 <= tbt_s <= max(gaps) + 1e-6

    def test_a_single_token_has_a_ttft_but_no_gaps(self) -> None:
        assert (FAILED.ttft_s, FAILED.tbt_s, FAILED.tpot_s) == (0.5, None, None)

    def test_a_request_without_tokens_has_no_latency(self) -> None:
        assert (REJECTED.first_token_s, REJECTED.ttft_s, REJECTED.e2e_s, REJECTED.tbt_s) == (None, None, None, None)

    def test_tpot_counts_tokens_and_not_events(self) -> None:
        merged = dataclasses.replace(GOOD, output_tokens=5)
        assert merged.tpot_s == pytest.approx(0.1 / 4)


class TestSlo:
    def test_a_request_is_effective_when_ttft_and_tbt_both_hold(self) -> None:
        assert is_effective(GOOD, Slo(ttft_s=1.0, tbt_s=0.051))
        assert not is_effective(GOOD, Slo(ttft_s=0.9, tbt_s=0.051))
        assert not is_effective(GOOD, Slo(ttft_s=1.0, tbt_s=0.04))

    def test_only_finished_requests_are_effective(self) -> None:
        assert not any(is_effective(r, Slo()) for r in (REJECTED, FAILED, ABORTED))

    def test_one_token_has_no_tbt_to_miss(self) -> None:
        assert is_effective(with_gaps(), Slo(ttft_s=1.0, tbt_s=0.0))

    def test_a_scaled_slo_grows_with_the_prompt_but_never_below_its_floor(self) -> None:
        long = dataclasses.replace(GOOD, unloaded_prefill_s=3.0)
        short = dataclasses.replace(GOOD, unloaded_prefill_s=0.1)
        assert ttft_limit_s(long, ScaledSlo()) == 15.0
        assert ttft_limit_s(short, ScaledSlo()) == 2.0

    def test_a_scaled_slo_needs_a_prefill_prediction(self) -> None:
        with pytest.raises(ConfigError, match="request a has no unloaded_prefill_s"):
            is_effective(GOOD, ScaledSlo())

    def test_rejected_and_failed_requests_were_offered_and_aborted_ones_were_not(self) -> None:
        reached = attainment([GOOD, REJECTED, FAILED, ABORTED], Slo())
        assert reached == Attainment(num_requests=3, num_effective=1, input_tokens=6100, effective_input_tokens=1000)
        assert reached.request_share == pytest.approx(1 / 3)

    def test_shedding_the_longest_prompts_is_not_capacity(self) -> None:
        honest, shedding = Attainment(100, 90, 1000, 900), Attainment(100, 95, 1000, 700)
        assert honest.is_within_capacity
        assert not shedding.is_within_capacity
        assert capacity({1.0: honest, 2.0: shedding}) == 1.0
        assert capacity({2.0: shedding}) is None

    def test_nothing_offered_is_nothing_served(self) -> None:
        assert attainment([], Slo()).request_share == 0.0
        assert attainment([], Slo()).token_share == 0.0


class TestSummary:
    records = (GOOD, dataclasses.replace(GOOD, id="b", cached_tokens=100), REJECTED, FAILED, ABORTED)

    def test_it_has_the_keys_of_vllm_bench_serve(self) -> None:
        result = summarise(self.records, duration_s=10.0, slo=Slo()).to_json()
        assert (result["completed"], result["failed"], result["duration"]) == (2, 1, 10.0)
        assert (result["total_input_tokens"], result["total_output_tokens"]) == (2000, 6)
        assert result["request_throughput"] == pytest.approx(0.2)
        assert result["output_throughput"] == pytest.approx(0.6)
        assert result["total_token_throughput"] == pytest.approx(200.6)
        for metric in ("ttft", "tpot", "itl", "e2el"):
            assert {f"{s}_{metric}_ms" for s in ("mean", "median", "std", "p99")} <= result.keys()
        assert result["mean_ttft_ms"] == pytest.approx(1000.0)
        assert result["p99_itl_ms"] == pytest.approx(50.0)

    def test_it_adds_slo_cache_and_reasons(self) -> None:
        result = summarise(self.records, duration_s=10.0, slo=Slo()).to_json()
        assert result["effective_request_share"] == pytest.approx(0.5)
        assert (result["total_cached_tokens"], result["cached_token_share"]) == (500, 0.25)
        assert (result["rejections"], result["failures"]) == ({"ttft_slo": 1}, {"disconnected": 1})
        assert result["slo"] == {"ttft_s": 30.0, "tbt_s": 0.1}
        assert result["mean_tbt_ms"] == pytest.approx(50.0)

    def test_reasons_come_most_frequent_first(self) -> None:
        rejected = [dataclasses.replace(REJECTED, reason=reason) for reason in ("b", "c", "a", "c", None)]
        summary = summarise(rejected, duration_s=1.0, slo=Slo())
        assert list(summary.rejections.items()) == [("c", 2), ("a", 1), ("b", 1), ("unknown", 1)]

    def test_a_run_without_an_answer_has_nulls_and_no_division_by_zero(self) -> None:
        result = summarise([], duration_s=0.0, slo=Slo()).to_json()
        assert result["mean_ttft_ms"] is None
        assert result["request_throughput"] == 0.0
        assert result["cached_token_share"] is None

    def test_a_server_that_tells_nothing_about_its_cache_is_not_a_cache_of_zero(self) -> None:
        summary = summarise([dataclasses.replace(GOOD, cached_tokens=None)], duration_s=1.0, slo=Slo())
        assert summary.cached_tokens is None


class TestTable:
    def test_it_has_the_shape_of_vllm_bench_serve(self) -> None:
        lines = render(summarise(TestSummary.records, duration_s=10.0, slo=Slo())).splitlines()
        assert lines[0] == "============ Serving Benchmark Result ============"
        assert lines[1] == "Successful requests:                     2"
        assert "---------------Time to First Token----------------" in lines
        assert "Mean TTFT (ms):                          1000.00" in lines
        assert "------------SLO: TTFT 30 s, TBT 100 ms------------" in lines
        assert "  ttft_slo:                              1" in lines
        assert "Aborted requests:                        1" in lines
        assert lines[-1] == "=" * 50

    def test_what_was_not_measured_prints_as_a_dash(self) -> None:
        assert (
            "P99 TPOT (ms):                           -" in render(summarise([], duration_s=0.0, slo=ScaledSlo())).splitlines()
        )
