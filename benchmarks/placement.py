"""How long one placement decision takes: a 128k-token prompt, from the event to the command, by policy and cluster size.

    python -m benchmarks.placement [--json]

Every third node holds a prefix of the prompt, seven different lengths of it, and 300 requests wait, so that the policy has
something to weigh. A block has 512 tokens as in the published traces, or 64 as in a served model. As machine code where that
was built (`python -m kvasir.native.build`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from random import Random

import kvasir.cli  # noqa: F401 (before all others: machine code, where it was built, as in the product)
from kvasir.core.events import Arrived, BlocksStored, InstanceInfo, InstanceJoined
from kvasir.core.keys import KEY_BYTES
from kvasir.core.request import Request, Role, Slo
from kvasir.costs.roofline import reference_cost
from kvasir.scheduling.conductor import Conductor
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.strategy import strategy

PROMPT_TOKENS = 128 * 1024 + 1
ROUNDS = 5
DECISIONS = 200
CASES = [(policy, count, block) for policy in ("kvasir", "mooncake") for count in (16, 1000) for block in (512, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    rows = []
    for policy, count, block_tokens in CASES:
        rounds = sorted(measure(policy, count, block_tokens) for _ in range(ROUNDS))
        rows.append(
            {
                "policy": policy,
                "instances": count,
                "block_tokens": block_tokens,
                "decision_us": statistics.median(rounds),
                "least_us": rounds[0],
                "most_us": rounds[-1],
            }
        )
    if as_json:
        json.dump({"benchmark": "placement", "prompt_tokens": PROMPT_TOKENS, "rows": rows}, sys.stdout, indent=2)
        print()
        return
    for row in rows:
        print("  ".join(f"{name} {value:.1f}" if isinstance(value, float) else f"{value}" for name, value in row.items()))


def measure(policy: str, count: int, block_tokens: int) -> float:
    """Mean microseconds of a decision."""
    conductor = busy_cluster(policy, count, block_tokens)
    keys = prompt_keys(block_tokens)
    requests = [Request(f"r{i}", PROMPT_TOKENS, 512, keys, 1.0) for i in range(DECISIONS)]
    begin = time.perf_counter()
    for index, request in enumerate(requests):
        conductor.handle(Arrived(request), 1.0 + index * 1e-3)
    return (time.perf_counter() - begin) / DECISIONS * 1e6


def busy_cluster(policy: str, count: int, block_tokens: int) -> Conductor:
    config = ConductorConfig(
        kv_bytes_per_token=327_680, block_tokens=block_tokens, max_queued=1_000_000, layerwise=True, max_stages=8
    )
    conductor = strategy(policy).conductor(config, reference_cost(), Slo(), Random(0))
    for index in range(count):
        role = Role.PREFILL if index < count // 2 else Role.DECODE
        conductor.handle(InstanceJoined(InstanceInfo(f"i{index:04}", role, f"n{index:04}", 1, 1_500_000, 512)), 0.0)
    keys = prompt_keys(block_tokens)
    for index in range(0, count, 3):
        held = len(keys) * (10 - index % 7) // 10
        conductor.handle(BlocksStored(f"n{index:04}", 1, keys[:held]), 0.0)
    for index in range(300):
        conductor.handle(Arrived(Request(f"w{index}", 8000, 512, (), 0.1)), 0.1)
    return conductor


def prompt_keys(block_tokens: int) -> tuple[bytes, ...]:
    return tuple(index.to_bytes(KEY_BYTES, "big") for index in range(1, PROMPT_TOKENS // block_tokens + 1))


if __name__ == "__main__":
    main()
