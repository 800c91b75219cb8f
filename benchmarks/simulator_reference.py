"""Whether the simple policies land where a simpler, independent model puts them.

`python -m benchmarks.simulator_reference [TRACE]` plays the conversation trace (a synthetic one without a file) on 16 nodes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvasir.cli.simulating import simulating
from kvasir.core.request import Role, Slo
from kvasir.costs.roofline import reference_cost
from kvasir.scheduling.strategy import strategy
from kvasir.simulator import SimConfig, simulate
from kvasir.simulator.run import Run
from kvasir.simulator.spec import ClusterSpec, InstanceSpec, NodeSpec
from kvasir.workload.synthesis import conversation
from kvasir.workload.trace import Trace, read_trace

REFERENCE = {
    "random": (0.11, 1.59, 9.9),
    "least-loaded": (0.105, 1.61, 2.17),
    "local": (0.30, 1.25, 1.54),
    "mooncake": (0.35, 1.17, 1.37),
}
"""Hit rate, prefill seconds a request and mean TTFT by an independent model: first come first served, one request at a time,
no overlap of layers. 8 prefill and 8 decode nodes at the trace's own speed."""

CHUNK_TOKENS = 4096
"""Steps of this size keep prompts that share a step few; the reference computes one prompt at a time."""


def paper_cluster() -> ClusterSpec:
    roles = [Role.PREFILL] * 8 + [Role.DECODE] * 8
    return ClusterSpec(
        name="paper-16",
        nodes=tuple(NodeSpec(f"node{i:02}", 3_000_000, 80e9) for i in range(16)),
        instances=tuple(InstanceSpec(f"{r.value}-{i:02}", f"node{i:02}", r, 1_500_000, 512) for i, r in enumerate(roles)),
        costs=reference_cost(),
        kv_bytes_per_token=327_680,
        num_layers=80,
    )


def timed(trace: Trace, policy: str, rounds: int) -> tuple[Run, float]:
    """The run, and the least CPU seconds that it took."""
    chosen = replace(strategy(policy).with_parts(admission="off"), chunk_tokens=CHUNK_TOKENS)
    config = SimConfig(layerwise=False)
    best_s = float("inf")
    for _ in range(rounds):
        with simulating():
            start_s = time.process_time()
            run = simulate(trace, paper_cluster(), chosen, slo=Slo(), config=config)
            best_s = min(best_s, time.process_time() - start_s)
    return run, best_s


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    trace = read_trace(path.read_bytes().splitlines()) if path else conversation(np.random.default_rng(0))
    rows = {}
    for policy, (hits, prefill_s, ttft_s) in REFERENCE.items():
        run, seconds = timed(trace, policy, rounds=3)
        summary = run.to_json()
        rows[policy] = {
            "cpu_s": round(seconds, 2),
            "hit_rate": [round(run.hit_rate, 3), hits],
            "prefill_s_per_request": [round(run.prefill_s_per_request, 3), prefill_s],
            "ttft_mean_s": [round(float(np.nanmean(run.records.ttft_s)), 3), ttft_s],
            "completed": summary["completed"],
        }
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"requests": len(trace.requests), "peak_mib": round(peak_mib), "ours_and_reference": rows}, indent=2))


if __name__ == "__main__":
    main()
