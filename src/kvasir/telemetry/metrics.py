"""Counts what the gateway sees of its requests, and shows it to Prometheus together with the cluster's state."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from kvasir.core.request import Slo
from kvasir.report.slo import is_effective
from kvasir.report.timeline import RequestRecord
from kvasir.telemetry.families import Families, StatusView
from kvasir.telemetry.histogram import Histogram

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_E2E_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
"""vLLM's edges, so that boards compare, with finer ones below where a small model needs them."""


RECENT = 1000
"""Requests whose latencies are kept for percentiles."""


class Metrics:
    """The numbers of one gateway, in a registry of their own. Written from one thread."""

    def __init__(
        self,
        *,
        model: str,
        block_tokens: int,
        status: Callable[[], StatusView],
        block_bytes: int = 0,
        slo: Slo | None = None,
    ):
        """`status` is asked for the cluster's state at each scrape; `slo` says which requests are effective."""
        self.slo = slo or Slo()
        self.effective = 0
        self.recent_ttft_s: deque[float] = deque(maxlen=RECENT)
        """Of the last requests that got their whole answer."""
        self.recent_tbt_s: deque[float] = deque(maxlen=RECENT)
        self.ttft_s = Histogram(_TTFT_S)
        self.itl_s = Histogram(_ITL_S)
        self.tpot_s = Histogram(_ITL_S)
        self.e2e_s = Histogram(_E2E_S)
        self.successes: Counter[str] = Counter()
        self.rejections: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._registry = CollectorRegistry(auto_describe=False)
        families = Families(self, model=model, block_tokens=block_tokens, status=status, block_bytes=block_bytes)
        self._registry.register(families)

    def rejected(self, code: str) -> None:
        self.rejections[code] += 1

    def prefix_looked_up(self, *, tokens: int, hit_tokens: int) -> None:
        self.prefix_query_tokens += tokens
        self.prefix_hit_tokens += hit_tokens

    def first_token_came(self, count: int, *, ttft_s: float, prompt_tokens: int) -> None:
        """A request's first `count` tokens, together."""
        self.ttft_s.observe(ttft_s)
        self.prompt_tokens += prompt_tokens
        self.generation_tokens += count

    def tokens_came(self, count: int, *, gap_s: float) -> None:
        """`count` further tokens, `gap_s` after the ones before."""
        self.itl_s.observe(gap_s / count, count)
        self.generation_tokens += count

    def finished(self, record: RequestRecord, finish: str) -> None:
        """A request got its whole answer."""
        self.successes[finish] += 1
        self.effective += is_effective(record, self.slo)
        if record.ttft_s is not None:
            self.recent_ttft_s.append(record.ttft_s)
        if record.tbt_s is not None:
            self.recent_tbt_s.append(record.tbt_s)
        if record.e2e_s is not None:
            self.e2e_s.observe(record.e2e_s)
        if record.tpot_s is not None:
            self.tpot_s.observe(record.tpot_s)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)
