"""Capacity of our scheduler and of others on one cluster: the table of docs/results/capacity.md.

    python -m benchmarks.capacity --trace conversation_trace.jsonl --jobs 2 --minutes 60
    python -m benchmarks.capacity --tables     # the results again, as Markdown

Capacity is the highest speed of the trace at which at least 90 % of the requests and 90 % of the input tokens are effective.
Sections: `main` (ours against Mooncake's Algorithm 1 at static ratios), `peers` (with early rejection by the SLO),
`peers-as-shipped` (mostly without), `ablation`, `jitter` (arrivals moved by up to 3 s, five seeds). A row is one capacity
search of about eight simulations. Each is written as soon as it is found, and what is in the file is not searched again:
started anew, it goes on; `--again` starts over. After `--minutes` no further row is begun.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

from kvasir.cli.bench.processes import results_of
from kvasir.cli.simulate.inputs import find_cluster, load_trace, objectives
from kvasir.cli.simulating import simulating
from kvasir.report.slo import Attainment
from kvasir.scheduling.strategy import Strategy, strategy
from kvasir.simulator import SimConfig, simulate
from kvasir.simulator.capacity import find_capacity
from kvasir.workload import scaling
from kvasir.workload.trace import Trace

RESULTS = Path(__file__).parent / "results" / "capacity.json"
CLUSTER = "paper-16"
SECTIONS = ("main", "peers", "jitter", "ablation", "peers-as-shipped")
SLOS = ("30s", "10s", "scaled")
SPLITS = ("8P8D", "10P6D", "12P4D", "13P3D", "14P2D")
BEST_SPLIT = {"30s": "13P3D", "10s": "13P3D", "scaled": "14P2D"}
"""Mooncake's, by the sweep of `main`."""

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
COLOCATED = ("colocated", "colocated-chunked")
ABLATIONS: dict[str, dict[str, str]] = {
    "placement as mooncake": {"placement": "mooncake"},
    "decode by assigned load": {"decode": "least-tbt"},
    "admission as mooncake": {"admission": "slo"},
    "eviction LRU": {"eviction": "lru"},
    "deadline first": {"order": "deadline-first"},
    "shortest first": {"order": "shortest-first"},
}
SEEDS = range(1, 6)
START = {"30s": 3.6, "10s": 3.0, "scaled": 3.0}
STRIDE = 1.25
LOWEST = 0.5
"""What does not hold half of the trace's own speed has none: at 10 s, no policy without pipelines does."""

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
        for ttft in SLOS:
            split = BEST_SPLIT[ttft]
            yield from (Row("peers", peer, peer, ttft, split, (("admission", "slo"),)) for peer in PEERS)
            yield from (Row("peers", peer, peer, ttft, "16M", (("admission", "slo"),)) for peer in COLOCATED)
    if "jitter" in sections:
        for seed in SEEDS:
            for ttft in SLOS:
                yield Row("jitter", "kvasir", "kvasir", ttft, seed=seed)
                if ttft != "10s":
                    yield Row("jitter", "mooncake, best split", "mooncake", ttft, BEST_SPLIT[ttft], seed=seed)
    if "ablation" in sections:
        for ttft in ("30s", "scaled"):
            yield from (Row("ablation", name, "kvasir", ttft, parts=tuple(parts.items())) for name, parts in ABLATIONS.items())
            yield from (Row("ablation", f"static {split}", "kvasir", ttft, split) for split in ("8P8D", "13P3D", "13P2D1M"))
        yield Row("ablation", "no pipelines", "kvasir", "10s", max_stages=1)
    if "peers-as-shipped" in sections:
        for ttft in SLOS:
            yield from (Row("peers-as-shipped", peer, peer, ttft, BEST_SPLIT[ttft]) for peer in PEERS)
            yield from (Row("peers-as-shipped", peer, peer, ttft, "16M") for peer in COLOCATED)


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
    """The row with its capacity; None below LOWEST."""
    trace, slo = trace_of(source, row.seed), objectives(row.ttft, "100ms")
    cluster, chosen = find_cluster(CLUSTER, row.split), scheduler(row)

    def evaluate(speed: float) -> Attainment:
        with simulating():
            return simulate(scaling.speed(trace, speed), cluster, chosen, slo=slo, config=SimConfig(sample_s=0.0)).attained

    found = find_capacity(evaluate, start=START[row.ttft], resolution=RESOLUTION, stride=STRIDE, lowest=LOWEST)
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
    if not capacities:
        return ""
    known = sorted({f"{c:.2f}" if isinstance(c, float) else f"< {LOWEST}" for c in capacities})
    return known[0] if len(known) == 1 else f"{known[0]} to {known[-1]}"


def row_of(result: dict[str, object]) -> Row:
    """The search that a line of the result file is of."""
    fields = {field: result[field] for field in Row.__dataclass_fields__}
    fields["parts"] = tuple((str(part), str(name)) for part, name in result["parts"])  # type: ignore[attr-defined]
    return Row(**fields)  # type: ignore[arg-type]


def write(results: dict[Row, dict[str, object]]) -> None:
    lines = sorted(results.values(), key=lambda result: SECTIONS.index(str(result["section"])))
    RESULTS.write_text(json.dumps({"benchmark": "capacity", "cluster": CLUSTER, "rows": lines}, indent=1) + "\n")


def find(source: str, wanted: list[Row], results: dict[Row, dict[str, object]], *, jobs: int, minutes: float) -> None:
    """Search `jobs` rows at a time, in order, and write what is found."""
    until_s = time.monotonic() + 60.0 * minutes
    for start in range(0, len(wanted), jobs):
        if time.monotonic() > until_s:
            print(f"{len(wanted) - start} rows are left; start it again to go on", file=sys.stderr)
            return
        tasks = {row: partial(search, source, row) for row in wanted[start : start + jobs]}
        results |= results_of(tasks, min(jobs, len(tasks)), lambda count, row: None)
        write(results)
        for row in tasks:
            done = f"{start + len(tasks)}/{len(wanted)}"
            capacity = results[row]["capacity"]
            print(f"{done} {row.section} {row.name}, TTFT {row.ttft}, seed {row.seed}: {capacity}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default="synthetic:conversation", help="a trace file, or synthetic:conversation")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--ttft", nargs="*", default=list(SLOS), choices=SLOS, help="only these objectives")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further search after so long")
    parser.add_argument("--again", action="store_true", help="search the rows again that are in the result file")
    parser.add_argument("--tables", action="store_true", help="print the results that are there, and measure nothing")
    asked = parser.parse_args()
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    results = {row_of(result): result for result in known}
    if not asked.tables:
        wanted = [row for row in rows(asked.sections) if row.ttft in asked.ttft and (asked.again or row not in results)]
        find(asked.trace, wanted, results, jobs=asked.jobs, minutes=asked.minutes)
    print("\n".join(tables(list(results.values()))))


if __name__ == "__main__":
    main()
