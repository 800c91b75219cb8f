"""The messenger beside its limits and its peers: `python -m benchmarks.messenger [--peers PYTHON]`; GB/s, medians over rounds.

`--peers` is the Python of the environment that benchmarks/peers/setup_transfer.sh makes. Peers run between the rounds of ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from kvasir.cli.bench.pool_transfer import MIB, SIZES, Measured, measure, ratios

PEERS = ("mooncake_transfer", "mooncake_store", "nixl_transfer", "redis_transfer")
PEER_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, help="Python of the peers' environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--working-set-mib", type=int, default=512)
    arguments = parser.parse_args()
    ours: dict[tuple[str, int], list[float]] = {}
    peers: dict[str, dict[str, list[float]]] = {}
    for _ in range(arguments.rounds):
        for one in measure(working_set=arguments.working_set_mib * MIB, rounds=1):
            ours.setdefault((one.name, one.nbytes), []).extend(one.rounds)
        for name in PEERS if arguments.peers else ():
            for way, speed in run_peer(arguments.peers, name, arguments.working_set_mib).items():
                peers.setdefault(name, {}).setdefault(way, []).append(speed)
    measured = [Measured(name, nbytes, tuple(rounds)) for (name, nbytes), rounds in ours.items()]
    print(json.dumps({"GB/s": table(measured), "ratios": ratios(measured), "peers, GB/s": medians(peers)}, indent=1))


def table(measured: list[Measured]) -> dict[str, dict[str, float]]:
    names = {one.name: None for one in measured}
    return {
        name: {
            f"{one.nbytes // 1024} KiB": round(one.median, 3) for one in measured if one.name == name and one.nbytes in SIZES
        }
        for name in names
    }


def medians(peers: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {name: {way: round(statistics.median(all_), 3) for way, all_ in ways.items()} for name, ways in peers.items()}


def run_peer(python: Path, name: str, working_set_mib: int) -> dict[str, float]:
    """GB/s by way and size; empty when the peer fails, which is said on standard error."""
    command = [str(python), "-m", f"benchmarks.peers.{name}", str(working_set_mib)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=PEER_S, check=False)
    if done.returncode:
        print(f"note: {name} did not run (exit {done.returncode})", file=sys.stderr)
        return {}
    speeds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return speeds


if __name__ == "__main__":
    main()
