"""A summary as plain text, in the shape of the `vllm bench serve` table."""

from collections.abc import Iterator

from kvasir.core.request import Slo
from kvasir.report.slo import ScaledSlo
from kvasir.report.summary import Distribution, Summary

_LABEL_WIDTH = 40
_WIDTH = 50

_TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "tbt": ("TBT", "Time Between Tokens (longest 10 %)"),
    "e2el": ("E2EL", "End-to-end Latency"),
}


def render(summary: Summary) -> str:
    """The table, without a trailing newline. Unmeasured values print as `-`."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]
    lines += _totals(summary)
    for metric, spread in summary.latencies_ms.items():
        lines += _latency(metric, spread)
    lines.append(f"{_slo_title(summary.slo):-^{_WIDTH}}")
    lines += _effective(summary)
    lines += _reasons(summary)
    lines.append("=" * _WIDTH)
    return "\n".join(lines)


def rule(title: str = "", line: str = "-") -> str:
    """A title in the middle of a line."""
    return f"{title:{line}^{_WIDTH}}"


def row(label: str, value: float | str | None) -> str:
    """`label:` and the value in one column; integers and texts as they are, floats with two decimals."""
    text = "-" if value is None else str(value) if isinstance(value, int | str) else f"{value:.2f}"
    return f"{label + ':':<{_LABEL_WIDTH}} {text}"


def _totals(summary: Summary) -> Iterator[str]:
    yield row("Successful requests", summary.num_completed)
    yield row("Failed requests", sum(summary.failures.values()))
    yield row("Benchmark duration (s)", summary.duration_s)
    yield row("Total input tokens", summary.input_tokens)
    yield row("Total generated tokens", summary.output_tokens)
    yield row("Request throughput (req/s)", summary.request_throughput)
    yield row("Request goodput (req/s)", summary.request_goodput)
    yield row("Output token throughput (tok/s)", summary.output_throughput)
    yield row("Total token throughput (tok/s)", summary.total_token_throughput)


def _latency(metric: str, spread: Distribution) -> Iterator[str]:
    short, title = _TITLES[metric]
    yield f"{title:-^{_WIDTH}}"
    yield row(f"Mean {short} (ms)", spread.mean)
    yield row(f"Median {short} (ms)", spread.median)
    yield row(f"P99 {short} (ms)", spread.p99)


def _slo_title(slo: Slo | ScaledSlo) -> str:
    if isinstance(slo, Slo):
        return f"SLO: TTFT {slo.ttft_s:g} s, TBT {slo.tbt_s * 1e3:g} ms"
    return f"SLO: TTFT {slo.ttft_factor:g}x (>= {slo.ttft_floor_s:g} s), TBT {slo.tbt_s * 1e3:g} ms"


def _effective(summary: Summary) -> Iterator[str]:
    yield row("Effective requests", summary.attained.num_effective)
    yield row("Effective requests (%)", summary.attained.request_share * 100)
    yield row("Effective input tokens (%)", summary.attained.token_share * 100)
    yield row("Cached input tokens", summary.cached_tokens)
    yield row("Cached input tokens (%)", None if summary.cached_share is None else summary.cached_share * 100)


def _reasons(summary: Summary) -> Iterator[str]:
    yield row("Rejected requests", sum(summary.rejections.values()))
    yield from (row(f"  {reason}", count) for reason, count in summary.rejections.items())
    if summary.failures:
        yield row("Failed requests, by reason", sum(summary.failures.values()))
        yield from (row(f"  {reason}", count) for reason, count in summary.failures.items())
    if summary.num_aborted:
        yield row("Aborted requests", summary.num_aborted)
