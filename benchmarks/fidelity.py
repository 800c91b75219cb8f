"""What the simulator predicts against what this machine does: the same trace served for real and simulated.

    python -m benchmarks.fidelity --json benchmarks/results/fidelity.json --markdown docs/results/fidelity.md

Profiles the engine, serves a slice of the trace with 1 prefill + 1 decode instance and with 1 mixed one, and simulates both
from the profile and the true arrival times. The profile is of the engine alone; what the rest of the service adds to a
step and to a first token is measured before the load: on lone requests, on some at a time, and on prompts beside a stream,
which also say what prefill and decode on the same cores leave each other. Run it while nothing else runs.
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
from statistics import fmean, median
from typing import TypeVar

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
LAYOUTS = {"1 prefill + 1 decode": (Role.PREFILL, Role.DECODE), "1 mixed": (Role.MIXED,)}
STASH = 32
LONE_PROMPT, LONE_OUTPUT, NUM_LONE = 256, 96, 9
CROWD, CROWD_OUTPUT = 8, 384
BESIDE_PROMPT, BESIDE_OUTPUT = 4096, 2048
EDGE_S = 0.02
"""Gaps this near to the ends of a prefill may be half beside it."""
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
class Calibration:
    """Measured on the service before the load, in seconds: TTFT and token gap of a request that has it to itself; the gap of
    CROWD requests at a time; TTFT of a long prompt alone and beside a stream, and that stream's gap meanwhile. `tail`: the mean
    of the longest tenth of those gaps over their median.
    """

    first_s: float
    gap_s: float
    crowd_gap_s: float
    prompt_s: float
    prompt_beside_s: float
    gap_beside_s: float
    tail: float


@dataclass(frozen=True)
class Overhead:
    """What the service adds to the engine's time: to each step, for each sequence in it beyond the first, and once to a first
    token without occupying an instance; how many times as long as in the profile a prefill takes, and a decode step where it
    is shorter (the machine may have been slower then). What prefill and decode leave each other of the cores that they
    share. And what the simulator does not know: how uneven equal steps are.
    """

    step_s: float
    sequence_s: float
    first_s: float
    prefill: float
    decode: float
    low_share: float
    normal_share: float
    tail: float

    @classmethod
    def of(cls, found: Calibration, costs: FittedCost) -> Overhead:
        lone_s = costs.decode_step_s(1, LONE_PROMPT + LONE_OUTPUT // 2)
        decode = min(1.0, found.gap_s / lone_s)
        prefill = found.prompt_s / _chunked_s(costs, BESIDE_PROMPT)
        step_s = max(0.0, found.gap_s - lone_s)
        costs = scaled(costs, prefill, decode)
        crowd_s = found.crowd_gap_s - step_s - costs.decode_step_s(CROWD, CROWD * (LONE_PROMPT + CROWD_OUTPUT // 2))
        alone_s = costs.decode_step_s(1, LONE_PROMPT + BESIDE_OUTPUT // 2) + step_s
        return cls(
            step_s=step_s,
            sequence_s=max(0.0, crowd_s) / (CROWD - 1),
            first_s=max(0.0, found.first_s - costs.prefill_s(LONE_PROMPT, 0) - step_s),
            prefill=prefill,
            decode=decode,
            # a decode instance pauses after each step for as long as it took: half of the time a prefill beside has the cores
            low_share=min(1.0, max(0.02, 2.0 * found.prompt_s / found.prompt_beside_s - 1.0)),
            normal_share=min(1.0, 2.0 * alone_s / found.gap_beside_s),
            tail=found.tail,
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


def _prompt(rng: Random, length: int) -> list[int]:
    return [rng.randrange(1000, 4000) for _ in range(length)]


def _gap_s(times: Sequence[float]) -> float:
    return median(later - earlier for earlier, later in pairwise(times))


async def calibrate(system: System) -> Calibration:
    rng, lone, crowds = Random(0), [], []
    for _ in range(2 + NUM_LONE):  # the first two warm up
        sent, times = await stream(system, _prompt(rng, LONE_PROMPT), LONE_OUTPUT)
        lone.append((times[0] - sent, _gap_s(times)))
    for _ in range(3):
        some = await asyncio.gather(*(stream(system, _prompt(rng, LONE_PROMPT), CROWD_OUTPUT) for _ in range(CROWD)))
        begin, end = max(times[0] for _, times in some), min(times[-1] for _, times in some)
        crowds += [_gap_s([at for at in times if begin <= at <= end]) for _, times in some]
    first_s, gap_s = (median(values) for values in zip(*lone[2:], strict=True))
    prompts = [await _prefill(system, rng) for _ in range(3)]
    beside = await _beside(system, rng)
    return Calibration(first_s, gap_s, median(crowds), median([end - begin for begin, end in prompts]), *beside)


async def _prefill(system: System, rng: Random) -> tuple[float, float]:
    """When a long prompt was sent, and when its first token came."""
    sent, times = await stream(system, _prompt(rng, BESIDE_PROMPT), 1)
    return sent, times[0]


async def _beside(system: System, rng: Random) -> tuple[float, float, float]:
    """Long prompts one after the other beside one stream: median TTFT, and median and tail of the stream's gaps meanwhile."""
    streaming = asyncio.create_task(stream(system, _prompt(rng, LONE_PROMPT), BESIDE_OUTPUT))
    await asyncio.sleep(0.3)
    prefills = []
    while not streaming.done():
        prefills.append(await _prefill(system, rng))
    _, times = await streaming
    whole = [(begin, end) for begin, end in prefills if begin > times[0] and end < times[-1]]
    gaps = [
        later - earlier
        for begin, end in whole
        for earlier, later in pairwise(times)
        if begin + EDGE_S <= earlier and later <= end - EDGE_S
    ]
    assert gaps, "no prompt was answered while the stream went on"
    longest = sorted(gaps)[-(-9 * len(gaps) // 10) :]
    return median([end - begin for begin, end in whole]), median(gaps), fmean(longest or gaps) / median(gaps)


def serve(config: ServeConfig, profile: Path, load: Load, directory: Path) -> tuple[Calibration, list[RequestRecord]]:
    """Start the service, calibrate, send the load, stop it: what every client saw."""
    prefill, decode, mixed = config.split
    roles = ["--prefill", str(prefill), "--decode", str(decode), "--mixed", str(mixed)]
    command = kvasir("serve", "--port", str(PORT), "--dram", config.dram, "--admission", "off", "--profile", str(profile))
    system = System("kvasir", Server.parse(f"http://127.0.0.1:{PORT}"), config.model)
    saved, log = directory / "requests.jsonl", directory / "serve.log"
    with running([*command, "--log-level", "warning", *roles], {}, log):
        asyncio.run(wait_ready(system, "/ready", log))
        found = asyncio.run(calibrate(system))
        flags = [*load.flags(), "--save-requests", str(saved), "--url", f"http://127.0.0.1:{PORT}"]
        subprocess.run(kvasir("replay", *flags), check=True, stdout=sys.stderr)
    decoder = msgspec.json.Decoder(RequestRecord)
    return found, [decoder.decode(line) for line in saved.read_bytes().splitlines()]


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
        tokens / (max(ends) - records[0].arrival_s),
    )


def simulated(run: Run, overhead: Overhead) -> Figures:
    r = run.records
    assert r.is_(Status.OK).all(), "every request must be answered to be compared"
    decode_s, gaps = r.end_s - r.arrival_s - r.ttft_s, r.output_tokens - 1
    mean_gaps = np.divide(decode_s, gaps, out=np.full(len(gaps), np.nan), where=gaps > 0)
    tokens_per_s = float(r.output_tokens.sum() / (r.end_s.max() - r.arrival_s[0]))
    return Figures(r.ttft_s + overhead.first_s, r.tbt_s * overhead.tail, mean_gaps, tokens_per_s)


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
        found, records = serve(config, profile, load, directory)
        overhead = Overhead.of(found, costs)
        run = predict(config, model_spec(config), costs, overhead, with_true_arrivals(trace, records))
        seen, told = measured(records).rows(), simulated(run, overhead).rows()
        print(f"{name}: {overhead}", file=sys.stderr)
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
