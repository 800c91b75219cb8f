"""What disaggregation and the control plane cost, through the whole stack of `kvasir serve`.

    python -m benchmarks.overheads --model /tmp/tiny --json

* hand-off: the gap between the first token (from the prefill instance) and the second (from the decode instance) of an 8k
  prompt, less an ordinary decode step, over the prompt's prefill time; 1 prefill + 1 decode instance.
* cached prefix: TTFT of an 8k prompt whose prefix is all cached over its cold TTFT, through the gateway.
* control plane: TTFT and token gap at 32 concurrent streams with an engine that takes exactly 20 ms for a prefill and for a
  decode step, less these 20 ms: gateway, conductor, instance and pool together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from datetime import date
from itertools import pairwise
from pathlib import Path
from random import Random

from benchmarks.serving import fresh, kvasir, running, stream, wait_ready
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit

PROMPT = 8192
ENGINE_S = 0.020
STREAMS = 32
ENGINE = FittedCost(PrefillFit(ENGINE_S, 0.0, 0.0, 0.0), DecodeFit(ENGINE_S, 0.0, 0.0), 1e-4, 1e10)


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in pairwise(times)]


async def hand_off_and_cache(model: Path, rounds: int) -> dict[str, object]:
    system, command, environment = kvasir(model, 8203, ["--prefill", "1", "--decode", "1"])
    log = Path(tempfile.gettempdir()) / "benchmark-overheads.log"
    rng = Random(2)
    cold, cached, extra, shares = [], [], [], []
    with running(command, environment, log):
        await wait_ready(system, "/ready", log)
        for number in range(rounds + 1):
            prompt = fresh(rng, PROMPT)
            sent, times = await stream(system, prompt, 32)
            again, warm = await stream(system, prompt, 32)
            if number == 0:
                continue
            ttft = times[0] - sent
            step = statistics.median(gaps(times)[4:])
            cold.append(ttft)
            cached.append(warm[0] - again)
            extra.append(gaps(times)[0] - step)
            shares.append((gaps(times)[0] - step) / ttft)
    return {
        "cold_ttft_ms": median_ms(cold),
        "cached_ttft_ms": median_ms(cached),
        "cached_over_cold": statistics.median(c / d for c, d in zip(cached, cold, strict=True)),
        "hand_off_ms": median_ms(extra),
        "hand_off_over_prefill": statistics.median(shares),
    }


async def control_plane(rounds: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        profile = Path(directory) / "costs.json"
        profile.write_bytes(ENGINE.to_json())
        flags = ["--engine", "fake", "--profile", str(profile), "--prefill", "1", "--decode", "1", "--chunk-tokens", "65536"]
        system, command, environment = kvasir(Path("kvasir-small"), 8204, flags)
        log = Path(directory) / "log"
        stack.enter_context(running(command, environment, log))
        await wait_ready(system, "/ready", log)
        rng = Random(3)
        alone, added, per_token = [], [], []
        for number in range(rounds + 1):
            background = [asyncio.create_task(stream(system, short(rng), 160)) for _ in range(STREAMS - 1)]
            await asyncio.sleep(1.5)
            sent, times = await stream(system, short(rng), 64)
            ended = await asyncio.gather(*background)
            one, first = await stream(system, short(rng), 2)
            if number:
                alone.append(first[0] - one - ENGINE_S)
                added.append(times[0] - sent - ENGINE_S)
                per_token += [gap - ENGINE_S for _, stamps in ended for gap in gaps(stamps)[20:-20]]
    return {
        "streams": STREAMS,
        "added_to_ttft_ms": median_ms(added),
        "added_to_ttft_alone_ms": median_ms(alone),
        "added_to_token_ms": median_ms(per_token),
        "added_to_token_mean_ms": round(statistics.fmean(per_token) * 1e3, 3),
    }


def short(rng: Random) -> list[int]:
    return [rng.randrange(10, 4000) for _ in range(256)]


def median_ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print nothing but JSON")
    arguments = parser.parse_args()
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores",
        "command": " ".join(sys.argv),
        "data_path": asyncio.run(hand_off_and_cache(arguments.model, arguments.rounds)),
        "control_plane": asyncio.run(control_plane(arguments.rounds)),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
