"""What a simulation gives: one row per request, samples, counters, and a summary as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np

from kvasir.core.commands import Decision
from kvasir.core.request import Slo
from kvasir.report.slo import Attainment, ScaledSlo, attainment_of
from kvasir.report.summary import Json
from kvasir.report.timeline import Status
from kvasir.simulator.records import Floats, Records
from kvasir.simulator.samples import Sample


@dataclass(frozen=True)
class Run:
    """One simulated run. `duration_s` is from the first arrival to the last outcome.

    `utilisation`: share of the time that instances spent in a role in which they computed a step, by role at the step's end.
    `asked_blocks` are the full prompt blocks of all requests that were placed, `found_blocks` those of them that were in a pool
    and used, on the instance's node or fetched, when the request's first prefill began. `prefill_s` is what all chunks took.
    """

    policy: str
    cluster: str
    slo: Slo | ScaledSlo
    seed: int
    records: Records
    samples: tuple[Sample, ...]
    instances: tuple[str, ...]
    nodes: tuple[str, ...]
    counters: Mapping[str, int]
    utilisation: Mapping[str, float]
    asked_blocks: int
    found_blocks: int
    prefill_s: float
    num_prefills: int
    duration_s: float
    decisions: tuple[Decision, ...] | None = None

    @cached_property
    def attained(self) -> Attainment:
        r = self.records
        return attainment_of(
            is_offered=~r.is_(Status.ABORTED),
            is_ok=r.is_(Status.OK),
            input_tokens=r.input_tokens,
            ttft_s=r.ttft_s,
            tbt_s=r.tbt_s,
            unloaded_prefill_s=r.unloaded_prefill_s,
            slo=self.slo,
        )

    @property
    def hit_rate(self) -> float:
        """Full prompt blocks that were found and used, of all full prompt blocks of the requests that were placed."""
        return self.found_blocks / self.asked_blocks if self.asked_blocks else 0.0

    @property
    def prefill_s_per_request(self) -> float:
        return self.prefill_s / self.num_prefills if self.num_prefills else 0.0

    def to_json(self) -> dict[str, Json]:
        """Latencies are of requests that got an answer; shares are of requests, and of input tokens, that were offered."""
        records, attained = self.records, self.attained
        ok = records.is_(Status.OK)
        return {
            "policy": self.policy,
            "cluster": self.cluster,
            "seed": self.seed,
            "slo": msgspec.to_builtins(self.slo),
            "requests": len(records.status),
            "completed": int(ok.sum()),
            "rejected": int(records.is_(Status.REJECTED).sum()),
            "failed": int(records.is_(Status.FAILED).sum()),
            "rejections": self._reasons(Status.REJECTED),
            "failures": self._reasons(Status.FAILED),
            "effective": attained.num_effective,
            "effective_requests": attained.request_share,
            "effective_input_tokens": attained.token_share,
            "within_capacity": attained.is_within_capacity,
            "ttft_s": _spread(records.ttft_s[ok]),
            "tbt_s": _spread(records.tbt_s[ok]),
            "hit_rate": self.hit_rate,
            "prefill_s_per_request": self.prefill_s_per_request,
            "utilisation": dict(self.utilisation),
            "duration_s": self.duration_s,
            "input_tokens": int(records.input_tokens[ok].sum()),
            "output_tokens": int(records.output_tokens[ok].sum()),
            "counters": dict(self.counters),
        }

    def _reasons(self, status: Status) -> dict[str, Json]:
        """Count by reason, in order of their names."""
        has = self.records.is_(status)
        reasons = [reason or "unknown" for reason, is_it in zip(self.records.reason, has.tolist(), strict=True) if is_it]
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def _spread(seconds: Floats) -> dict[str, Json]:
    """Mean and percentiles of what was measured; None where nothing was."""
    measured = seconds[~np.isnan(seconds)]
    if not measured.size:
        return {"mean": None, "p50": None, "p90": None, "p99": None}
    p50, p90, p99 = (float(p) for p in np.percentile(measured, [50, 90, 99]))
    return {"mean": float(measured.mean()), "p50": p50, "p90": p90, "p99": p99}
