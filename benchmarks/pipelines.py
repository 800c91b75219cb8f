"""TTFT of long prompts on one prefill instance and in a chunked pipeline over several, each with a core of its own.

    python -m kvasir.engine.random_model /tmp/tiny --size tiny
    python -m benchmarks.pipelines --model /tmp/tiny [--stages 2] [--rounds 5] [--json]

Two services with as many prefill instances of one thread each, measured in turn with fresh prompts, one at a time: one may put
the instances in a row, the other not. The objective is so short that every prompt is late on one instance.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from random import Random

from benchmarks.serving import System, fresh, kvasir, running, stream, wait_ready

LENGTHS = (2048, 4096, 8192, 12288)
PORTS = {"alone": 8211, "pipeline": 8212}


async def measure(model: Path, stages: int, rounds: int, logs: Path) -> dict[int, dict[str, list[float]]]:
    """Seconds by length and service, without the first round, which warms up."""
    seconds: dict[int, dict[str, list[float]]] = {length: {name: [] for name in PORTS} for length in LENGTHS}
    flags = ["--prefill", str(stages), "--decode", "1", "--threads", "1", "--slo-ttft", "100ms"]
    rng = Random(1)
    with ExitStack() as stack:
        systems: dict[str, System] = {}
        for name, port in PORTS.items():
            more = ["--stages", str(stages)] if name == "pipeline" else []
            systems[name], command, environment = kvasir(model, port, [*flags, *more])
            stack.enter_context(running(command, environment, logs / name))
        for name, system in systems.items():
            await wait_ready(system, "/ready", logs / name)
        for round_ in range(rounds + 1):
            for length in LENGTHS:
                for name, system in systems.items():
                    sent, times = await stream(system, fresh(rng, length), 2)
                    if round_:
                        seconds[length][name].append(times[0] - sent)
    return seconds


def summary(seconds: dict[int, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Medians, and the median over the rounds of alone over pipeline."""
    return {
        str(length): {
            **{f"{name}_s": round(statistics.median(values), 3) for name, values in by_name.items()},
            "faster": round(statistics.median(a / b for a, b in zip(*by_name.values(), strict=True)), 2),
        }
        for length, by_name in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as logs:
        found = summary(asyncio.run(measure(arguments.model, arguments.stages, arguments.rounds, Path(logs))))
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "command": f"python -m benchmarks.pipelines --model tiny --stages {arguments.stages}",
        "ttft": found,
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{'tokens':>8}{'alone, s':>12}{'pipeline, s':>14}{'faster':>10}")
    for length, row in found.items():
        print(f"{length:>8}{row['alone_s']:>12}{row['pipeline_s']:>14}{row['faster']:>9}x")


if __name__ == "__main__":
    main()
