"""What the simulator predicts against what this machine does: the same trace served for real and simulated.

    python -m benchmarks.fidelity --json benchmarks/results/fidelity.json --markdown docs/results/fidelity.md

Profiles the engine, serves a slice of the trace with 1 prefill + 1 decode instance and with 1 mixed one, and simulates both
from the profile and the true arrival times. The profile is of the engine alone; what the rest of the service adds to a
step and to a first token is measured on lone requests before the load. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median

import msgspec
import numpy as np

from benchmarks.serving import System, running, stream, wait_ready
from kvasir.cli.costs import load_profile
from kvasir.cli.replay.http import Server
from kvasir.cli.replay.workload import Shape, load_trace, shaped
from kvasir.cluster.config import ServeConfig
from kvasir.cluster.model import model_spec
from kvasir.core.request import Role, Slo
from kvasir.core.units import parse_duration
from kvasir.costs.fitted import FittedCost
from kvasir.engine.interface import ModelSpec
from kvasir.report.timeline import RequestRecord, Status
from kvasir.scheduling.strategy import Strategy, strategy
from kvasir.simulator import SimConfig, simulate
from kvasir.simulator.run import Run
from kvasir.simulator.spec import ClusterSpec, InstanceSpec, MemoryKind, NodeSpec
from kvasir.store.arena import slots_that_fit
from kvasir.workload.trace import Trace

PORT = 8203
LAYOUTS = {"1 prefill + 1 decode": (Role.PREFILL, Role.DECODE), "1 mixed": (Role.MIXED,)}
LOW_SHARE = 0.16
"""Of the cores, for prefill while a decode step runs: 58 % = 50 % + 50 % x 0.16, docs/decisions/0003-cores-by-priority.md."""
STASH = 32
LONE_PROMPT, LONE_OUTPUT, NUM_LONE = 256, 96, 9
HEARTBEAT_S = 0.5


@dataclass(frozen=True)
class Load:
    """What is sent: a slice of a trace, scaled to the machine."""

    trace: str
    limit: int
    speed: float
    scale_length: float

    def flags(self) -> list[str]:
        return [self.trace, "--limit", str(self.limit), "--speed", str(self.speed), "--scale-length", str(self.scale_length)]

    def requests(self) -> Trace:
        shape = Shape(limit=self.limit, speed=self.speed, scale_length=self.scale_length)
        return shaped(load_trace(self.trace), shape)


@dataclass(frozen=True)
class Figures:
    """Seconds by request, and output tokens a second from the first arrival to the last token."""

    ttft_s: np.ndarray
    tbt_s: np.ndarray
    gap_s: np.ndarray
    tokens_per_s: float

    def rows(self) -> dict[str, float]:
        rows = {}
        for name, values in (("TTFT", self.ttft_s), ("TBT", self.tbt_s), ("mean token gap", self.gap_s)):
            for p in (50, 90):
                rows[f"{name} p{p}, ms"] = float(np.nanpercentile(values, p)) * 1e3
        rows["throughput, tokens/s"] = self.tokens_per_s
        return rows


@dataclass(frozen=True)
class Overhead:
    """What the service adds to the engine's time: to each step, and once to a first token without occupying an instance."""

    step_s: float
    first_s: float

    @classmethod
    def of(cls, lone: Sequence[tuple[float, float]], costs: FittedCost) -> Overhead:
        """From (TTFT, token gap) of lone requests."""
        ttft_s, gap_s = (median(values) for values in zip(*lone, strict=True))
        step_s = max(0.0, gap_s - costs.decode_step_s(1, LONE_PROMPT + LONE_OUTPUT // 2))
        return cls(step_s, max(0.0, ttft_s - costs.prefill_s(LONE_PROMPT, 0) - step_s))

    def on(self, costs: FittedCost) -> FittedCost:
        prefill = msgspec.structs.replace(costs.prefill, base_s=costs.prefill.base_s + self.step_s)
        decode = msgspec.structs.replace(costs.decode, base_s=costs.decode.base_s + self.step_s)
        return msgspec.structs.replace(costs, prefill=prefill, decode=decode)


def kvasir(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvasir.cli.main", *arguments]


async def lone_request(system: System, rng: Random) -> tuple[float, float]:
    """TTFT and median token gap of a request that has the service to itself."""
    prompt = [rng.randrange(1000, 4000) for _ in range(LONE_PROMPT)]
    sent, times = await stream(system, prompt, LONE_OUTPUT)
    return times[0] - sent, median(later - earlier for earlier, later in pairwise(times))


def serve(
    config: ServeConfig, profile: Path, load: Load, directory: Path
) -> tuple[list[tuple[float, float]], list[RequestRecord]]:
    """Start the service, send lone requests, then the load, stop it: what every client saw."""
    prefill, decode, mixed = config.roles
    roles = ["--prefill", str(prefill), "--decode", str(decode), "--mixed", str(mixed)]
    command = kvasir("serve", "--port", str(PORT), "--dram", config.dram, "--admission", "off", "--profile", str(profile))
    system = System("kvasir", Server.parse(f"http://127.0.0.1:{PORT}"), config.model)
    saved, log = directory / "requests.jsonl", directory / "serve.log"
    with running([*command, "--log-level", "warning", *roles], {}, log):
        asyncio.run(wait_ready(system, "/ready", log))
        rng = Random(0)
        lone = [asyncio.run(lone_request(system, rng)) for _ in range(2 + NUM_LONE)][2:]
        flags = [*load.flags(), "--save-requests", str(saved), "--url", f"http://127.0.0.1:{PORT}"]
        subprocess.run(kvasir("replay", *flags), check=True, stdout=sys.stderr)
    decoder = msgspec.json.Decoder(RequestRecord)
    return lone, [decoder.decode(line) for line in saved.read_bytes().splitlines()]


def predict(config: ServeConfig, spec: ModelSpec, costs: FittedCost, trace: Trace, roles: Sequence[Role]) -> Run:
    """The same cluster, simulated."""
    num_slots = slots_that_fit(config.dram_bytes, spec.slot_bytes)
    kv_tokens = num_slots * spec.block_tokens
    cluster = ClusterSpec(
        name="this machine",
        nodes=(NodeSpec("node0", kv_tokens, costs.transfer_bandwidth),),
        instances=tuple(InstanceSpec(f"{role}-0", "node0", role, kv_tokens, config.max_batch) for role in roles),
        costs=costs,
        kv_bytes_per_token=spec.shape.kv_bytes_per_token,
        num_layers=spec.shape.num_layers,
        block_tokens=spec.block_tokens,
        memory=MemoryKind.SHARED,
        heartbeat_s=HEARTBEAT_S,
        low_share=LOW_SHARE,
    )
    slo = Slo(parse_duration(config.slo_ttft), parse_duration(config.slo_tbt))
    settings = SimConfig(
        layerwise=False, max_tokens=1, max_repeats=1, stash_pages=min(STASH, num_slots // (8 * len(roles))), sample_s=0.0
    )
    return simulate(trace, cluster, as_served(config), slo=slo, config=settings)


def as_served(config: ServeConfig) -> Strategy:
    """The scheduler with the chunks that `kvasir serve` makes: of `chunk_tokens`, in steps of half of the TBT objective."""
    scheduler = strategy(config.policy).with_parts(admission="off")
    return replace(scheduler, chunk_tokens=config.chunk_tokens, step_share=0.5)


def measured(records: Sequence[RequestRecord]) -> Figures:
    assert all(record.status is Status.OK for record in records), "every request must be answered to be compared"
    ends = [record.token_times_s[-1] for record in records]
    tokens = sum(len(record.token_times_s) for record in records)
    return Figures(
        np.array([record.ttft_s for record in records]),
        np.array([np.nan if record.tbt_s is None else record.tbt_s for record in records]),
        np.array([np.nan if record.tpot_s is None else record.tpot_s for record in records]),
        tokens / (max(ends) - records[0].arrival_s),
    )


def simulated(run: Run, overhead: Overhead) -> Figures:
    r = run.records
    assert r.is_(Status.OK).all(), "every request must be answered to be compared"
    decode_s, gaps = r.end_s - r.arrival_s - r.ttft_s, r.output_tokens - 1
    mean_gaps = np.divide(decode_s, gaps, out=np.full(len(gaps), np.nan), where=gaps > 0)
    tokens_per_s = float(r.output_tokens.sum() / (r.end_s.max() - r.arrival_s[0]))
    return Figures(r.ttft_s + overhead.first_s, r.tbt_s, mean_gaps, tokens_per_s)


def with_true_arrivals(trace: Trace, records: Sequence[RequestRecord]) -> Trace:
    """The requests that were sent, when they were sent, as long as they were answered."""
    requests = []
    for record in records:
        request = trace.requests[int(record.id)]
        requests.append(replace(request, arrival_s=record.arrival_s, output_tokens=len(record.token_times_s)))
    return replace(trace, requests=tuple(requests))


def compare(load: Load, profile: Path, directory: Path) -> dict[str, list[dict[str, object]]]:
    costs, trace = load_profile(profile), load.requests()
    tables: dict[str, list[dict[str, object]]] = {}
    for name, roles in LAYOUTS.items():
        count = [sum(role is each for each in roles) for role in (Role.PREFILL, Role.DECODE, Role.MIXED)]
        config = ServeConfig(prefill=count[0], decode=count[1], mixed=count[2], dram="1GiB")
        lone, records = serve(config, profile, load, directory)
        overhead = Overhead.of(lone, costs)
        run = predict(config, model_spec(config), overhead.on(costs), with_true_arrivals(trace, records), roles)
        seen, told = measured(records).rows(), simulated(run, overhead).rows()
        print(f"{name}: the service adds {overhead.step_s * 1e3:.2f} ms a step, {overhead.first_s * 1e3:.2f} ms a first token")
        tables[name] = [
            {"figure": figure, "predicted": told[figure], "measured": seen[figure], "ratio": told[figure] / seen[figure]}
            for figure in seen
        ]
    return tables


def lines(tables: dict[str, list[dict[str, object]]]) -> Iterator[str]:
    for name, rows in tables.items():
        yield from (f"### {name}", "", "| | predicted | measured | predicted / measured |", "|---|---|---|---|")
        for row in rows:
            yield f"| {row['figure']} | {row['predicted']:.4g} | {row['measured']:.4g} | {row['ratio']:.2f} |"
        yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default="synthetic:conversation")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--scale-length", type=float, default=0.125)
    parser.add_argument("--profile", type=Path, help="a profile of `kvasir profile`; made anew when left out")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--markdown", type=Path, help="a page whose tables, from the first `###` to the next `##`, are replaced"
    )
    arguments = parser.parse_args()
    busy = os.getloadavg()[0]
    load = Load(arguments.trace, arguments.limit, arguments.speed, arguments.scale_length)
    with tempfile.TemporaryDirectory() as directory:
        profile = arguments.profile
        if profile is None:
            profile = Path(directory) / "profile.json"
            subprocess.run(kvasir("profile", "--out", str(profile)), check=True)
        tables = compare(load, profile, Path(directory))
    text = "\n".join([*lines(tables), f"Load average of {os.cpu_count()} cores before the run: {busy:.1f}.", ""])
    print(text)
    if arguments.markdown:
        page = arguments.markdown.read_text()
        head, _, tail = page.partition("### ")
        arguments.markdown.write_text(head + text + tail[tail.index("\n## ") :])
    if arguments.json:
        result = {
            "date": date.today().isoformat(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "load_average_before": busy,
            "command": " ".join(["python -m benchmarks.fidelity", *sys.argv[1:]]),
            "layouts": tables,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
