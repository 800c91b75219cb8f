"""TTFT of a long prompt by where its KV is, through the whole stack of `kvasir serve`, over the TTFT of computing it.

    python -m kvasir.engine.random_model /tmp/tiny --size tiny
    python -m benchmarks.tiers --model /tmp/tiny --disk DIRECTORY [--rounds 5] [--json]

* cold: nothing of the prompt is anywhere.
* dram: all of it is in the DRAM of the node that prefills.
* other_node: it is on the head node, which only decodes; the node that prefills has just joined, and fetches it.
* ssd: it was evicted from DRAM by others since, and is on the node's SSD.
* restart: the whole service was stopped and started again; what is on the SSD is all there is.

Every round has prompts of its own; figures are medians over rounds after a first one that warms up, with the spread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from random import Random

from benchmarks.serving import System, fresh, kvasir, running, stream, wait_ready
from kvasir.cli.replay.http import exchange

PROMPT = 8192
PORT = 8205
NODES = "127.0.0.1:8206"


async def ttft(system: System, prompt: list[int]) -> float:
    sent, times = await stream(system, prompt, 4)
    return times[0] - sent


async def on_two_nodes(model: Path, rounds: int, logs: Path) -> dict[str, list[float]]:
    """The head decodes and keeps what was handed to it; each round another node joins to prefill."""
    flags = ["--prefill", "0", "--decode", "1", "--listen-nodes", NODES, "--policy", "memserve", "--dram", "4GiB"]
    system, command, environment = kvasir(model, PORT, flags)
    rng = Random(4)
    seconds: dict[str, list[float]] = {"cold": [], "dram": [], "other_node": []}
    with running(command, environment, logs / "head"):
        prompts = [fresh(rng, PROMPT) for _ in range(rounds + 1)]
        with joined(model, environment, logs / "first"):
            await wait_ready(system, "/ready", logs / "head")
            for prompt in prompts:
                seconds["cold"].append(await ttft(system, prompt))
                seconds["dram"].append(await ttft(system, prompt))
        await wait_unready(system)
        with joined(model, environment, logs / "second"):
            await wait_ready(system, "/ready", logs / "head")
            await ttft(system, fresh(rng, 512))
            for prompt in prompts:
                seconds["other_node"].append(await ttft(system, prompt))
    return seconds


@contextmanager
def joined(model: Path, environment: dict[str, str], log: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "kvasir.cli.main", "serve", str(model), "--join", NODES, "--log-level", "warning"]
    with running([*command, "--prefill", "1", "--decode", "0", "--dram", "4GiB"], environment, log):
        yield


async def wait_unready(system: System) -> None:
    """Until the head has noticed that the other node has left."""
    async with asyncio.timeout(30.0):
        while True:
            async with exchange(system.server, "GET", "/ready") as answer:
                if answer.status != 200:
                    return
            await asyncio.sleep(0.1)


async def on_ssd(model: Path, rounds: int, logs: Path, disk: Path, dram: str) -> dict[str, list[float]]:
    flags = ["--mixed", "1", "--dram", dram, "--ssd", "8GiB", "--ssd-path", str(disk)]
    system, command, environment = kvasir(model, PORT, flags)
    rng = Random(5)
    prompts = [fresh(rng, PROMPT) for _ in range(rounds + 3)]
    seconds: dict[str, list[float]] = {"ssd": [], "restart": []}
    with running(command, environment, logs / "ssd"):
        await wait_ready(system, "/ready", logs / "ssd")
        for prompt in prompts:
            await ttft(system, prompt)
        for prompt in prompts[: rounds + 1]:
            seconds["ssd"].append(await ttft(system, prompt))
        await asyncio.sleep(3.0)  # what was computed last is written, too
    with running(command, environment, logs / "restart"):
        await wait_ready(system, "/ready", logs / "restart")
        for prompt in prompts[: rounds + 1]:
            seconds["restart"].append(await ttft(system, prompt))
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Without the first round of each, which warms up; `share` is the median over that of computing it."""
    cold_s = statistics.median(seconds["cold"][1:])
    return {
        name: {
            "median_ms": round(statistics.median(values[1:]) * 1e3, 1),
            "least_ms": round(min(values[1:]) * 1e3, 1),
            "most_ms": round(max(values[1:]) * 1e3, 1),
            "share": round(statistics.median(values[1:]) / cold_s, 3),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--disk", type=Path, required=True, help="an empty directory on the disk to measure; it is removed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dram", default="160MiB", help="DRAM of the SSD runs: two to three prompts of 8,192 tokens")
    parser.add_argument("--json", action="store_true", help="print nothing but JSON")
    arguments = parser.parse_args()
    arguments.disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        logs = Path(directory)
        try:
            seconds = asyncio.run(on_two_nodes(arguments.model, arguments.rounds, logs))
            seconds |= asyncio.run(on_ssd(arguments.model, arguments.rounds, logs, arguments.disk, arguments.dram))
        finally:
            shutil.rmtree(arguments.disk, ignore_errors=True)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "command": "python -m benchmarks.tiers --model tiny",
        "prompt_tokens": PROMPT,
        "ttft": summary(seconds),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
