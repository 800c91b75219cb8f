"""Kvasir against vLLM on one machine: same model, same cores, same client, measurements in turn.

    python -m kvasir.engine.random_model /tmp/tiny --size tiny
    benchmarks/peers/setup_vllm.sh /tmp/vllm
    python -m benchmarks.serving --model /tmp/tiny --vllm /tmp/vllm --json benchmarks/results/serving-tiny.json

Both servers run from the start to the end; each case is measured on one, then on the other, round after round. Prompts are
random token ids, a new one each time, so nothing is cached unless the case says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from random import Random

from kvasir.cli.replay.completion import Endpoint, StreamReading, request_body
from kvasir.cli.replay.http import Server, exchange
from kvasir.cli.replay.sse import SseParser

READY_S = 300.0
REQUEST_S = 300.0
FIRST_ID, LAST_ID = 1000, 31000


@dataclass(frozen=True)
class System:
    """A server under test."""

    name: str
    server: Server
    model: str


@dataclass(frozen=True)
class Case:
    """One figure: its name, its unit, whether more is better, and how one round of it is measured."""

    name: str
    unit: str
    more_is_better: bool
    measure: Callable[[System, Random], Awaitable[float]]


async def stream(
    system: System, prompt: list[int], max_tokens: int, reading: StreamReading | None = None
) -> tuple[float, list[float]]:
    """When the request was sent, and when each token came; of one that is cancelled, `reading` has those so far."""
    body = request_body(Endpoint.COMPLETIONS, system.model, prompt, max_tokens, ignore_eos=True)
    reading = reading if reading is not None else StreamReading()
    sent = time.perf_counter()
    async with asyncio.timeout(REQUEST_S), exchange(system.server, "POST", "/v1/completions", body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{system.name} answered {answer.status}")
        events = SseParser()
        async for piece in answer.body():
            now = time.perf_counter()
            for event in events.feed(piece):
                reading.read(event, now)
    if reading.error or not reading.is_complete:
        raise RuntimeError(f"{system.name}: {reading.error or 'stream broke off'}")
    return sent, list(reading.token_times_s())


def fresh(rng: Random, length: int) -> list[int]:
    return [rng.randrange(FIRST_ID, LAST_ID) for _ in range(length)]


def prefill(length: int) -> Case:
    async def measure(system: System, rng: Random) -> float:
        sent, times = await stream(system, fresh(rng, length), 1)
        return length / (times[0] - sent)

    return Case(f"prefill {length} tokens", "tok/s", True, measure)


def cached(length: int) -> Case:
    async def measure(system: System, rng: Random) -> float:
        prompt = fresh(rng, length)
        await stream(system, prompt, 1)
        sent, times = await stream(system, prompt, 1)
        return (times[0] - sent) * 1e3

    return Case(f"TTFT, {length} tokens all cached", "ms", False, measure)


def decode(batch: int, context: int = 512, output: int = 128) -> Case:
    """Tokens a second while all `batch` sequences decode: from the last first token to the first last token.

    Answers are longer the more prompts there are to compute first, or the first would have ended before the last began.
    """

    async def measure(system: System, rng: Random) -> float:
        tokens = output + 16 * batch
        runs = await asyncio.gather(*(stream(system, fresh(rng, context), tokens) for _ in range(batch)))
        start = max(times[0] for _, times in runs)
        end = min(times[-1] for _, times in runs)
        count = sum(start < at <= end for _, times in runs for at in times)
        return count / (end - start)

    return Case(f"decode, batch {batch}, context {context}", "tok/s", True, measure)


def load(count: int = 24, at_once: int = 8, length: int = 2048, output: int = 128) -> list[Case]:
    """Closed loop: `at_once` clients, `count` requests; one run gives three figures."""

    async def run(system: System, rng: Random) -> tuple[float, float, float]:
        gate = asyncio.Semaphore(at_once)

        async def one(prompt: list[int]) -> tuple[float, list[float]]:
            async with gate:
                return await stream(system, prompt, output)

        started = time.perf_counter()
        runs = await asyncio.gather(*(one(fresh(rng, length)) for _ in range(count)))
        seconds = time.perf_counter() - started
        gaps = sorted(b - a for _, times in runs for a, b in pairwise(times))
        ttft = statistics.median(times[0] - sent for sent, times in runs)
        return count * output / seconds, ttft, gaps[int(0.99 * (len(gaps) - 1))] * 1e3

    last: dict[str, tuple[float, float, float]] = {}

    def part(index: int) -> Callable[[System, Random], Awaitable[float]]:
        async def measure(system: System, rng: Random) -> float:
            if index == 0:
                last[system.name] = await run(system, rng)
            return last[system.name][index]

        return measure

    shape = f"{count} requests, {at_once} at a time, {length} in, {output} out"
    return [
        Case(f"{shape}: output", "tok/s", True, part(0)),
        Case(f"{shape}: TTFT p50", "s", False, part(1)),
        Case(f"{shape}: token gap p99", "ms", False, part(2)),
    ]


CASES = [prefill(2048), prefill(8192), cached(8192), decode(1), decode(8), decode(32), *load()]


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=out, stderr=out, start_new_session=True)
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


async def wait_ready(system: System, path: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        try:
            async with exchange(system.server, "GET", path) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        await asyncio.sleep(0.5)
    raise RuntimeError(f"{system.name} was not ready; see {log}")


def kvasir(model: Path, port: int, roles: list[str]) -> tuple[System, list[str], dict[str, str]]:
    command = [sys.executable, "-m", "kvasir.cli.main", "serve", str(model), "--port", str(port), "--served-model-name", "m"]
    command += ["--dram", "4GiB", "--admission", "off", "--log-level", "warning", "--max-model-len", "16384", *roles]
    return System("kvasir", Server.parse(f"http://127.0.0.1:{port}"), "m"), command, {}


def vllm(model: Path, venv: Path, port: int) -> tuple[System, list[str], dict[str, str]]:
    preload = [venv / "lib/libiomp5.so", Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")]
    environment = {
        "LD_PRELOAD": ":".join(str(path) for path in preload if path.exists()),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(venv / "bin/vllm"), "serve", str(model), "--served-model-name", "m", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", "16384"]
    return System("vllm", Server.parse(f"http://127.0.0.1:{port}"), "m"), command, environment


async def compare(systems: list[System], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Figures by case and system, a round of all cases at a time, the first round thrown away."""
    rng = Random(1)
    figures: dict[str, dict[str, list[float]]] = {case.name: {s.name: [] for s in systems} for case in CASES}
    for number in range(rounds + 1):
        for case in CASES:
            for system in systems if number % 2 else systems[::-1]:
                value = await case.measure(system, rng)
                if number:
                    figures[case.name][system.name].append(value)
                print(f"round {number}  {case.name:60} {system.name:8} {value:10.1f} {case.unit}", file=sys.stderr, flush=True)
    return figures


def summary(figures: dict[str, dict[str, list[float]]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for case in CASES:
        by_system = figures[case.name]
        row: dict[str, object] = {"case": case.name, "unit": case.unit}
        for name, values in by_system.items():
            row[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        if len(by_system) == 2:
            ours, theirs = (statistics.median(by_system[name]) for name in ("kvasir", "vllm"))
            row["kvasir_over_vllm"] = ours / theirs if case.more_is_better else theirs / ours
        rows.append(row)
    return rows


def show(rows: list[dict[str, object]]) -> None:
    for row in rows:
        parts = [
            f"{name} {value['median']:.4g} ({value['min']:.4g}-{value['max']:.4g})"
            for name, value in row.items()
            if isinstance(value, dict)
        ]
        ratio = row.get("kvasir_over_vllm")
        tail = f"  {ratio:.2f}x" if isinstance(ratio, float) else ""
        print(f"{row['case']!s:62} {row['unit']!s:6} {'  '.join(parts)}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory with a vocabulary of 32,000")
    parser.add_argument(
        "--vllm", type=Path, help="virtual environment made by benchmarks/peers/setup_vllm.sh; without it only Kvasir runs"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--roles", default="--mixed 1", help="flags of kvasir serve")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started = [kvasir(arguments.model, 8201, arguments.roles.split())]
    if arguments.vllm:
        started.append(vllm(arguments.model, arguments.vllm.resolve(), 8202))
    with ExitStack() as stack:
        for system, command, environment in started:
            stack.enter_context(running(command, environment, Path(f"/tmp/benchmark-{system.name}.log")))

        async def measure() -> dict[str, dict[str, list[float]]]:
            for system, _, _ in started:
                await wait_ready(
                    system, "/ready" if system.name == "kvasir" else "/health", Path(f"/tmp/benchmark-{system.name}.log")
                )
            return await compare([system for system, _, _ in started], arguments.rounds)

        rows = summary(asyncio.run(measure()))
    show(rows)
    if arguments.json:
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        result = {
            "date": date.today().isoformat(),
            "machine": machine,
            "command": " ".join(["python -m benchmarks.serving", *sys.argv[1:]]),
            "rounds": arguments.rounds,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
