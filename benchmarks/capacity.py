"""Capacity of our scheduler and of others on one cluster: the table of docs/results/capacity.md.

    python -m benchmarks.capacity --trace conversation_trace.jsonl --jobs 2
    python -m benchmarks.capacity --tables     # the results again, as Markdown

Capacity is the highest speed of the trace at which at least 90 % of the requests and 90 % of the input tokens are effective.
Sections: `main` (ours against Mooncake's Algorithm 1 at static ratios), `peers`, `ablation`, `jitter` (arrivals moved by up to
3 s, five seeds). A row is one capacity search of about ten simulations.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

from kvasir.cli.bench.processes import results_of
from kvasir.cli.collector import collector_paused
from kvasir.cli.simulate.inputs import find_cluster, load_trace, objectives
from kvasir.report.slo import Attainment
from kvasir.scheduling.strategy import Strategy, strategy
from kvasir.simulator import SimConfig, simulate
from kvasir.simulator.capacity import find_capacity
from kvasir.workload import scaling
from kvasir.workload.trace import Trace

RESULTS = Path(__file__).parent / "results" / "capacity.json"
CLUSTER = "paper-16"
SECTIONS = ("main", "peers", "ablation", "jitter")
SLOS = ("30s", "10s", "scaled")
SPLITS = ("8P8D", "10P6D", "12P4D", "13P3D", "14P2D")
BEST_SPLIT = "13P3D"
PEERS = (
    "memserve",
    "dynamo",
    "llm-d",
    "sglang",
    "aibrix",
    "aibrix-conductor",
    "ray",
    "production-stack",
    "local",
    "least-loaded",
)
ABLATIONS: dict[str, dict[str, str]] = {
    "placement as mooncake": {"placement": "mooncake"},
    "decode by assigned load": {"decode": "least-tbt"},
    "admission as mooncake": {"admission": "slo"},
    "eviction LRU": {"eviction": "lru"},
    "deadline first": {"order": "deadline-first"},
    "shortest first": {"order": "shortest-first"},
}
SEEDS = range(1, 6)
START = {"30s": 3.0, "10s": 1.0, "scaled": 2.5}
RESOLUTION = 0.015


@dataclass(frozen=True, slots=True)
class Row:
    """One search: `split` None is elastic; `seed` above 0 moves arrivals."""

    section: str
    name: str
    policy: str
    ttft: str
    split: str | None = None
    parts: tuple[tuple[str, str], ...] = ()
    max_stages: int | None = None
    seed: int = 0


def rows(sections: list[str]) -> Iterator[Row]:
    """All rows of these sections."""
    if "main" in sections:
        for ttft in SLOS:
            yield Row("main", "kvasir", "kvasir", ttft)
            yield from (Row("main", f"mooncake {split}", "mooncake", ttft, split) for split in SPLITS)
    if "peers" in sections:
        for ttft in ("30s", "scaled"):
            for peer in PEERS:
                admission = (("admission", "slo"),)
                yield Row("peers", f"{peer} {BEST_SPLIT}", peer, ttft, BEST_SPLIT)
                yield Row("peers", f"{peer} {BEST_SPLIT}, SLO admission", peer, ttft, BEST_SPLIT, admission)
            yield from (Row("peers", policy, policy, ttft, "16M") for policy in ("colocated", "colocated-chunked"))
    if "ablation" in sections:
        for ttft in ("30s", "scaled"):
            yield from (Row("ablation", name, "kvasir", ttft, parts=tuple(parts.items())) for name, parts in ABLATIONS.items())
            yield from (Row("ablation", f"static {split}", "kvasir", ttft, split) for split in ("8P8D", BEST_SPLIT))
        yield Row("ablation", "no pipelines", "kvasir", "10s", max_stages=1)
    if "jitter" in sections:
        for seed in SEEDS:
            for ttft in ("30s", "scaled"):
                yield Row("jitter", "kvasir", "kvasir", ttft, seed=seed)
                yield Row("jitter", f"mooncake {BEST_SPLIT}", "mooncake", ttft, BEST_SPLIT, seed=seed)


def scheduler(row: Row) -> Strategy:
    chosen = strategy(row.policy).with_parts(**dict(row.parts))
    if row.split is not None and not chosen.is_colocated:
        chosen = chosen.with_parts(roles="static")
    return chosen if row.max_stages is None else replace(chosen, max_stages=row.max_stages)


@cache
def trace_of(source: str, seed: int) -> Trace:
    trace = load_trace(source)
    return scaling.jitter(trace, random.Random(seed), width_s=3.0) if seed else trace


def search(source: str, row: Row) -> dict[str, object]:
    """The row with its capacity; None when even the lowest speed fails."""
    trace, slo = trace_of(source, row.seed), objectives(row.ttft, "100ms")
    cluster, chosen = find_cluster(CLUSTER, row.split), scheduler(row)

    def evaluate(speed: float) -> Attainment:
        with collector_paused():
            return simulate(scaling.speed(trace, speed), cluster, chosen, slo=slo, config=SimConfig(sample_s=0.0)).attained

    found = find_capacity(evaluate, start=START[row.ttft], resolution=RESOLUTION)
    return asdict(row) | {"capacity": found.speed, "probes": len(found.probes)}


def tables(results: list[dict[str, object]]) -> Iterator[str]:
    """A Markdown table for each section: a line a scheduler, a column an SLO; of several seeds, their range."""
    for section in dict.fromkeys(row["section"] for row in results):
        here = [row for row in results if row["section"] == section]
        slos = [slo for slo in SLOS if any(row["ttft"] == slo for row in here)]
        yield f"\n## {section}\n"
        yield "| | " + " | ".join(f"TTFT {slo}" for slo in slos) + " |"
        yield "|---|" + "--:|" * len(slos)
        for name in dict.fromkeys(str(row["name"]) for row in here):
            cells = [_range([row["capacity"] for row in here if (row["name"], row["ttft"]) == (name, slo)]) for slo in slos]
            yield f"| {name} | " + " | ".join(cells) + " |"


def _range(capacities: list[object]) -> str:
    known = [c if isinstance(c, float) else 0.0 for c in capacities]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default="synthetic:conversation", help="a trace file, or synthetic:conversation")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--tables", action="store_true", help="print the results that are there, and measure nothing")
    asked = parser.parse_args()
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    if asked.tables:
        print("\n".join(tables(known)))
        return
    results = [row for row in known if row["section"] not in asked.sections]
    tasks = {row: partial(search, asked.trace, row) for row in rows(asked.sections)}

    def on_done(count: int, row: Row) -> None:
        print(f"{count}/{len(tasks)} {row.section} {row.name}, TTFT {row.ttft}, seed {row.seed}", file=sys.stderr, flush=True)

    results += results_of(tasks, asked.jobs, on_done).values()
    results.sort(key=lambda row: SECTIONS.index(str(row["section"])))
    RESULTS.write_text(json.dumps({"benchmark": "capacity", "cluster": CLUSTER, "rows": results}, indent=1) + "\n")
    print("\n".join(tables(results)))


if __name__ == "__main__":
    main()
