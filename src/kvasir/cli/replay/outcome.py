"""What a replay hands back: the summary with the client's own account, as table, JSON and request lines."""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from kvasir.cli.replay.load import LoadResult
from kvasir.cli.replay.workload import Fit
from kvasir.core.request import Slo
from kvasir.report.summary import Json, Summary, summarise
from kvasir.report.table import render, row

LATE_S = 0.05
"""A client later than this at its p99 shifts what it measures: half of the default TBT objective."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished or interrupted replay."""

    model: str
    load: LoadResult
    fit: Fit
    summary: Summary

    @classmethod
    def of(cls, model: str, load: LoadResult, fit: Fit, slo: Slo) -> "Outcome":
        """Sum up `load`."""
        return cls(model, load, fit, summarise(load.records, duration_s=load.duration_s, slo=slo))

    @property
    def send_delay_p99_s(self) -> float:
        """How late requests were sent, 99th percentile."""
        return float(np.percentile(self.load.send_delays_s, 99)) if self.load.send_delays_s else 0.0

    @property
    def num_unsent(self) -> int:
        """Requests that an interrupted replay did not come to."""
        return len(self.fit.requests) - len(self.load.records)

    def table(self) -> str:
        """The benchmark table with the client's lines at its end."""
        *lines, rule = render(self.summary).splitlines()
        lines.append(f"{'Client':-^{len(rule)}}")
        lines.append(row("P99 send delay (ms)", self.send_delay_p99_s * 1e3))
        lines.append(row("Skipped: longer than the context", len(self.fit.skipped)))
        if self.num_unsent:
            lines.append(row("Not sent", self.num_unsent))
        return "\n".join([*lines, rule])

    def to_json(self) -> dict[str, Json]:
        """The summary's keys, then the client's."""
        return self.summary.to_json() | {
            "model_id": self.model,
            "p99_send_delay_ms": self.send_delay_p99_s * 1e3,
            "skipped": len(self.fit.skipped),
            "skipped_input_tokens": sum(r.input_tokens for r in self.fit.skipped),
            "not_sent": self.num_unsent,
            "interrupted": self.load.was_stopped,
        }

    def request_lines(self) -> Iterator[bytes]:
        """One JSON object a request, in order of sending: its timeline as recorded."""
        return (msgspec.json.encode(record) + b"\n" for record in self.load.records)

    def warnings(self) -> Iterator[str]:
        """What the reader of the figures must know."""
        if self.fit.skipped:
            yield (
                f"{len(self.fit.skipped)} of {len(self.fit.skipped) + len(self.fit.requests)} requests are longer than the "
                "model's context and were not sent; a smaller --scale-length lets them in"
            )
        if self.send_delay_p99_s > LATE_S:
            yield (
                f"the client was late: p99 send delay {self.send_delay_p99_s * 1e3:.0f} ms; the load was lighter than the "
                "trace's, so lower --speed, raise --max-in-flight, or give the client its own core"
            )
