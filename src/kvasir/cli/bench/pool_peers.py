"""Other systems that move blocks between two processes of this machine, each run by a driver in an environment of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvasir.cli.bench.pool_transfer import Measured
from kvasir.cli.bench.sizes import KIB, size_name

PEERS: Mapping[str, str] = {
    "mooncake_transfer": "tcp",
    "mooncake_store": "tcp",
    "nixl_transfer": "shm",
    "redis_transfer": "shm",
    "lmcache_server": "shm",
}
"""Driver in benchmarks/peers → the transport of ours that does what it does: NIXL copies between processes; who stays in one
host has no need of a socket, as Redis and LMCache's server have it."""

PEER_S = 300.0


@dataclass(slots=True)
class PeerRuns:
    """GB/s of one peer by way and size (`put_batch16 64 KiB`), each round beside one of ours; or why there are none."""

    name: str
    python: Path
    rounds: list[dict[str, float]] = field(default_factory=list)
    failure: str = ""

    def run(self, working_set_mib: int) -> None:
        """One round, unless an earlier one failed."""
        if self.failure:
            return
        command = [str(self.python), "-m", f"benchmarks.peers.{self.name}", str(working_set_mib)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=PEER_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            self.failure = f"did not run: {error}"
            return
        if done.returncode:
            self.failure = f"did not run: exit status {done.returncode}"
            return
        self.rounds.append(json.loads(done.stdout.splitlines()[-1]))

    def medians(self) -> dict[str, float]:
        """GB/s."""
        return {way: round(statistics.median(r[way] for r in self.rounds), 3) for way in self.rounds[0]}

    def ours_over(self, ours: Sequence[Measured]) -> dict[str, float]:
        """Way and size → ours over the peer's, median over rounds, as far as both were measured."""
        transport, found = PEERS[self.name], {}
        for measured in ours:
            way, size = measured.name.removeprefix(f"{transport}_"), f"{measured.nbytes // KIB} KiB"
            if way == measured.name or f"{way} {size}" not in self.rounds[0]:
                continue
            ratios = [mine / theirs[f"{way} {size}"] for mine, theirs in zip(measured.rounds, self.rounds, strict=True)]
            found[f"{way} {size_name(measured.nbytes)}"] = round(statistics.median(ratios), 2)
        return found
