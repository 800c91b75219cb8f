"""What the simulator predicts against what this machine does: the same trace served for real and simulated.

    python -m benchmarks.fidelity --json benchmarks/results/fidelity.json --markdown docs/results/fidelity.md

Profiles the engine, serves a slice of the trace with 1 prefill + 1 decode instance and with 1 mixed one, and simulates both
from the profile and the true arrival times. The profile is of the engine alone; what the rest of the service adds, and how
fast it is at the moment, is measured by requests of its own before, between and after the parts of the load, since a
virtual machine changes its speed within minutes. Run it while nothing else runs; it takes a quarter of an hour.
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
from functools import cache
from operator import sub
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec
import numpy as np

from benchmarks.serving import System, running, wait_ready
from benchmarks.speeds import (
    BESIDE_PROMPT,
    CROWD,
    CROWD_OUTPUT,
    LONE_OUTPUT,
    LONE_PROMPT,
    Lengths,
    Speeds,
    measure,
    sample,
)
from kvasir.cli.costs import load_profile
from kvasir.cli.replay.http import Server
from kvasir.cli.replay.workload import Shape, load_trace, shaped
from kvasir.cluster.config import ServeConfig
from kvasir.cluster.model import model_spec
from kvasir.core.request import Role, Slo
from kvasir.core.units import parse_duration
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.engine.interface import ModelSpec
from kvasir.report.timeline import RequestRecord, Status
from kvasir.scheduling.strategy import Strategy, strategy
from kvasir.simulator import SimConfig, simulate
from kvasir.simulator.run import Run
from kvasir.simulator.spec import ClusterSpec, InstanceSpec, MemoryKind, NodeSpec
from kvasir.store.arena import slots_that_fit
from kvasir.workload.trace import Trace

Fit = TypeVar("Fit", PrefillFit, DecodeFit)

PORT = 8203
URL = f"http://127.0.0.1:{PORT}"
LAYOUTS = {"1 prefill + 1 decode": (Role.PREFILL, Role.DECODE), "1 mixed": (Role.MIXED,)}
STASH = 32
NUM_PARTS = 4
"""Of the load."""
HEARTBEAT_S = 0.5

loaded = cache(load_trace)  # every part is of the same one


@dataclass(frozen=True)
class Load:
    """What is sent: a slice of a trace, scaled to the machine."""

    trace: str
    limit: int
    speed: float
    scale_length: float

    def parts(self) -> list[Part]:
        """One after the other."""
        times = [request.arrival_s for request in loaded(self.trace).requests[: self.limit]]
        bounds = [len(times) * i // NUM_PARTS for i in range(NUM_PARTS + 1)]
        starts = [(times[i - 1] + times[i]) / 2 if i else 0.0 for i in bounds[:-1]]
        return [Part(self, *part) for part in zip(starts, map(sub, bounds[1:], bounds), strict=True)]


@dataclass(frozen=True)
class Part:
    """`limit` requests from `start_s` of the trace on."""

    load: Load
    start_s: float
    limit: int

    def flags(self) -> list[str]:
        load = self.load
        scales = ["--speed", str(load.speed), "--scale-length", str(load.scale_length)]
        return [load.trace, "--start", f"{self.start_s}s", "--limit", str(self.limit), *scales]

    def requests(self) -> Trace:
        load = self.load
        shape = Shape(start_s=self.start_s, limit=self.limit, speed=load.speed, scale_length=load.scale_length)
        return shaped(loaded(load.trace), shape)


@dataclass(frozen=True)
class Figures:
    """Seconds by request; output tokens, and the seconds from the first arrival to the last of them."""

    ttft_s: np.ndarray
    tbt_s: np.ndarray
    gap_s: np.ndarray
    tokens: int
    seconds: float

    @classmethod
    def of_all(cls, parts: Sequence[Figures]) -> Figures:
        return cls(
            np.concatenate([part.ttft_s for part in parts]),
            np.concatenate([part.tbt_s for part in parts]),
            np.concatenate([part.gap_s for part in parts]),
            sum(part.tokens for part in parts),
            sum(part.seconds for part in parts),
        )

    def rows(self) -> dict[str, float]:
        rows = {}
        for name, values in (("TTFT", self.ttft_s), ("TBT", self.tbt_s), ("mean token gap", self.gap_s)):
            for p in (50, 90):
                rows[f"{name} p{p}, ms"] = float(np.nanpercentile(values, p)) * 1e3
        rows["throughput, tokens/s"] = self.tokens / self.seconds
        return rows


@dataclass(frozen=True)
class Overhead:
    """What the service adds to the engine's time: to each step, for each sequence in it beyond the first, to a hand-off, and
    once to a first token without occupying an instance; how many times as long as in the profile a prefill takes, and a decode
    step where it is shorter (the machine may have been slower then). What prefill and decode leave each other of the
    cores that they share, and how uneven equal steps are.
    """

    step_s: float
    sequence_s: float
    hand_off_s: float
    first_s: float
    prefill: float
    decode: float
    low_share: float
    normal_share: float
    step_noise: tuple[float, ...]

    @classmethod
    def of(cls, found: Speeds, costs: FittedCost) -> Overhead:
        lone_s = costs.decode_step_s(1, LONE_PROMPT + LONE_OUTPUT // 2)
        decode = min(1.0, found.gap_s / lone_s)
        prefill = found.prompt_s / _chunked_s(costs, BESIDE_PROMPT)
        step_s = max(0.0, found.gap_s - lone_s)
        costs = scaled(costs, prefill, decode)
        crowd_s = found.crowd_gap_s - step_s - costs.decode_step_s(CROWD, CROWD * (LONE_PROMPT + CROWD_OUTPUT // 2))
        sequence_s = max(0.0, crowd_s) / (CROWD - 1)
        undisturbed_s = costs.decode_step_s(1, round(found.context_beside)) + step_s
        undisturbed_s += (costs.decode.per_sequence_s + sequence_s) * (found.batch_beside - 1)
        return cls(
            step_s=step_s,
            sequence_s=sequence_s,
            hand_off_s=found.hand_off_s,
            first_s=max(0.0, found.first_s - costs.prefill_s(LONE_PROMPT, 0) - step_s),
            prefill=prefill,
            decode=decode,
            # a decode instance pauses after each step for as long as it took: half of the time a prefill beside has the cores
            low_share=min(1.0, max(0.02, 2.0 * found.prompt_s / found.prompt_beside_s - 1.0)),
            normal_share=min(1.0, 2.0 * undisturbed_s / found.gap_beside_s),
            step_noise=found.factors,
        )

    def on(self, costs: FittedCost) -> FittedCost:
        costs = scaled(costs, self.prefill, self.decode)
        prefill = msgspec.structs.replace(costs.prefill, base_s=costs.prefill.base_s + self.step_s)
        base_s = costs.decode.base_s + self.step_s - self.sequence_s
        per_sequence_s = costs.decode.per_sequence_s + self.sequence_s
        decode = msgspec.structs.replace(costs.decode, base_s=base_s, per_sequence_s=per_sequence_s)
        return msgspec.structs.replace(costs, prefill=prefill, decode=decode)


def scaled(costs: FittedCost, prefill: float, decode: float) -> FittedCost:
    """Where each phase takes so many times as long."""
    return msgspec.structs.replace(costs, prefill=_times(costs.prefill, prefill), decode=_times(costs.decode, decode))


def _times(fit: Fit, factor: float) -> Fit:
    return msgspec.structs.replace(
        fit, **{name: getattr(fit, name) * factor for name in fit.__struct_fields__ if name.endswith("_s")}
    )


def _chunked_s(costs: FittedCost, tokens: int) -> float:
    """A prompt computed in the chunks that an instance makes."""
    chunk = ServeConfig().chunk_tokens
    return sum(costs.prefill_s(min(chunk, tokens - start), start) for start in range(0, tokens, chunk))


def kvasir(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvasir.cli.main", *arguments]


def serve(config: ServeConfig, profile: Path, parts: Sequence[Part], directory: Path) -> list[Served]:
    """Start the service, send the parts of the load, each to empty caches and between measurements of speed, and stop it."""
    prefill, decode, mixed = config.split
    roles = ["--prefill", str(prefill), "--decode", str(decode), "--mixed", str(mixed)]
    command = kvasir("serve", "--port", str(PORT), "--dram", config.dram, "--admission", "off", "--profile", str(profile))
    system = System("kvasir", Server.parse(URL), config.model)
    saved, log = directory / "requests.jsonl", directory / "serve.log"
    decoder = msgspec.json.Decoder(RequestRecord)
    served, asked = [], sample(lengths_of(parts))
    with running([*command, "--log-level", "warning", *roles], {}, log):
        asyncio.run(wait_ready(system, "/ready", log))
        asyncio.run(measure(system, asked))  # warms up
        before = asyncio.run(measure(system, asked))
        for part in parts:
            httpx.post(f"{URL}/admin/cache/clear").raise_for_status()
            subprocess.run(
                kvasir("replay", *part.flags(), "--save-requests", str(saved), "--url", URL), check=True, stdout=sys.stderr
            )
            records = [decoder.decode(line) for line in saved.read_bytes().splitlines()]
            after = asyncio.run(measure(system, asked))
            served.append(Served(part, before.between(after), records))
            before = after
    return served


def lengths_of(parts: Sequence[Part]) -> list[Lengths]:
    return [Lengths(r.input_tokens, r.output_tokens) for part in parts for r in part.requests().requests]


@dataclass(frozen=True)
class Served:
    """A part of the load, how fast the service was meanwhile, and what every client saw."""

    part: Part
    speeds: Speeds
    records: list[RequestRecord]


def predict(config: ServeConfig, spec: ModelSpec, costs: FittedCost, overhead: Overhead, trace: Trace) -> Run:
    """The same cluster, simulated."""
    num_slots = slots_that_fit(config.dram_bytes, spec.slot_bytes)
    kv_tokens = num_slots * spec.block_tokens
    costs = overhead.on(costs)
    roles = [
        role for role, count in zip((Role.PREFILL, Role.DECODE, Role.MIXED), config.split, strict=True) for _ in range(count)
    ]
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
        low_share=overhead.low_share,
        normal_share=overhead.normal_share,
        hand_off_s=overhead.hand_off_s,
        step_noise=overhead.step_noise,
    )
    slo = Slo(parse_duration(config.slo_ttft), parse_duration(config.slo_tbt))
    settings = SimConfig(
        layerwise=False, max_tokens=1, max_repeats=1, stash_pages=min(STASH, num_slots // (8 * len(roles))), sample_s=0.0
    )
    return simulate(trace, cluster, as_served(config), slo=slo, config=settings)


def as_served(config: ServeConfig) -> Strategy:
    """The scheduler as `kvasir serve` has it: its roles, and chunks of `chunk_tokens` in steps of half of the TBT objective."""
    scheduler = strategy(config.policy).with_parts(admission="off", roles=config.role_rule)
    return scheduler.live(config.chunk_tokens)


def measured(records: Sequence[RequestRecord]) -> Figures:
    assert all(record.status is Status.OK for record in records), "every request must be answered to be compared"
    ends = [record.token_times_s[-1] for record in records]
    tokens = sum(len(record.token_times_s) for record in records)
    return Figures(
        np.array([record.ttft_s for record in records]),
        np.array([np.nan if record.tbt_s is None else record.tbt_s for record in records]),
        np.array([np.nan if record.tpot_s is None else record.tpot_s for record in records]),
        tokens,
        max(ends) - min(record.arrival_s for record in records),
    )


def simulated(run: Run, overhead: Overhead) -> Figures:
    r = run.records
    assert r.is_(Status.OK).all(), "every request must be answered to be compared"
    decode_s, gaps = r.end_s - r.arrival_s - r.ttft_s, r.output_tokens - 1
    mean_gaps = np.divide(decode_s, gaps, out=np.full(len(gaps), np.nan), where=gaps > 0)
    seconds = float(r.end_s.max() - r.arrival_s[0])
    return Figures(r.ttft_s + overhead.first_s, r.tbt_s, mean_gaps, int(r.output_tokens.sum()), seconds)


def with_true_arrivals(trace: Trace, records: Sequence[RequestRecord]) -> Trace:
    """The requests that were sent, when they were sent, as long as they were answered."""
    requests = []
    for record in records:
        request = trace.requests[int(record.id)]
        requests.append(replace(request, arrival_s=record.arrival_s, output_tokens=len(record.token_times_s)))
    return replace(trace, requests=tuple(requests))


def compare(load: Load, profile: Path, directory: Path) -> dict[str, list[dict[str, object]]]:
    costs, parts = load_profile(profile), load.parts()
    tables: dict[str, list[dict[str, object]]] = {}
    for name, roles in LAYOUTS.items():
        count = [sum(role is each for each in roles) for role in (Role.PREFILL, Role.DECODE, Role.MIXED)]
        config = ServeConfig(prefill=count[0], decode=count[1], mixed=count[2], dram="1GiB")
        spec, found, expected = model_spec(config), [], []
        for served in serve(config, profile, parts, directory):
            overhead = Overhead.of(served.speeds, costs)
            print(f"{name}: {overhead}", file=sys.stderr)
            trace = with_true_arrivals(served.part.requests(), served.records)
            expected.append(simulated(predict(config, spec, costs, overhead, trace), overhead))
            found.append(measured(served.records))
        told, seen = Figures.of_all(expected).rows(), Figures.of_all(found).rows()
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
    if arguments.markdown and not arguments.markdown.is_file():
        parser.error(f"--markdown {arguments.markdown}: expected a page that is there, whose tables can be replaced")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json {arguments.json}: its folder does not exist")
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
