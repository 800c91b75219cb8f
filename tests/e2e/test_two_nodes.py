"""Two nodes on one machine, real processes: tokens equal plain `transformers` across nodes, deaths, departures."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvasir.cluster.config import ServeConfig
from tests.e2e.real import RealCluster, Said, answer, expect_same, greedy, idle, real_cluster
from tests.e2e.test_parity import BLOCK, OUTPUT, checkpoint, plain, prompt_of, reference

__all__ = ["checkpoint", "reference"]

pytestmark = pytest.mark.timeout(240)

START_S = 90.0


def settings(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(checkpoint),
        "dtype": "float32",
        "block_tokens": BLOCK,
        "dram": "64MiB",
        "policy": "mooncake",
        "chunk_tokens": 48,
        "max_batch": 16,
        "log_level": "warning",
        **changes,
    }


@dataclass
class Node:
    """A second node, as its operator would start it."""

    process: subprocess.Popen[bytes]
    log: Path

    def ends(self, status: int) -> str:
        """What it said until it ended with this status."""
        found = self.process.wait(60.0)
        said = self.log.read_text()
        assert found == status, said
        return said


@contextmanager
def joined(address: str, checkpoint: Path, *, within: Sequence[str] = (), **changes: Any) -> Iterator[Node]:
    """Killed with all its processes at the end; `within` is a command that runs it, as in another network."""
    values = settings(checkpoint, join=address, **changes)
    model = values.pop("model")
    flags = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [*within, sys.executable, "-m", "kvasir.cli.main", "serve", model, *flags]
    log = checkpoint.parent / f"{time.monotonic_ns()}.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, start_new_session=True)
    try:
        yield Node(process, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30.0)


def wait_until(cluster: RealCluster, instances: int) -> None:
    deadline = time.monotonic() + START_S
    while len(cluster.hub.status().instances) != instances:
        assert time.monotonic() < deadline, cluster.hub.status()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def head(checkpoint: Path) -> Iterator[RealCluster]:
    """A head that only prefills: whatever decodes has joined."""
    config = ServeConfig(**settings(checkpoint, prefill=1, decode=1, listen_nodes="127.0.0.1:0"))
    with real_cluster(config) as found:
        yield found
        found.run(idle(found.hub))


def address(head: RealCluster) -> str:
    found = head.cluster.cluster_address
    assert found is not None
    return found.removeprefix("tcp://")


def ask_all(head: RealCluster, reference: Any, name: str, prompts: list[list[int]], after: Any = None) -> None:
    """All at once, each answer right; `after(count)` hears of each token of the first."""

    async def all_at_once() -> list[tuple[Said, int]]:
        asked = [greedy(f"{name}-{number}", prompt, OUTPUT) for number, prompt in enumerate(prompts)]
        calls = [answer(head.hub, one, *([after] if after is not None and not n else [])) for n, one in enumerate(asked)]
        return await asyncio.gather(*calls)

    for prompt, (said, _) in zip(prompts, head.run(all_at_once(), 120.0), strict=True):
        expect_same(said, plain(reference, prompt))


def traffic(seed: int, count: int) -> list[list[int]]:
    """Prompts of all lengths, half of which share a beginning."""
    rng = Random(seed)
    shared = prompt_of(seed, 80)
    return [(shared if n % 2 else []) + prompt_of(seed + n, rng.randrange(1, 150)) for n in range(count)]


def test_a_node_that_joins_takes_part_and_leaves_in_order(head: RealCluster, reference: Any, checkpoint: Path) -> None:
    with joined(address(head), checkpoint, prefill=1, decode=1) as node:
        wait_until(head, 4)
        for turn in range(3):
            ask_all(head, reference, f"both-{turn}", traffic(1000 + 100 * turn, 12))
        counters = head.hub.status().counters
        assert counters["finished"] >= 36
        used = set(head.cluster.hub.status().pools)
        assert len(used) == 2
        head.run(idle(head.hub))
        node.process.send_signal(signal.SIGINT)
        assert "left the cluster" in node.ends(0)
        wait_until(head, 2)
    ask_all(head, reference, "alone", traffic(2000, 4))


def test_a_node_that_is_killed_in_mid_stream_costs_no_token(head: RealCluster, reference: Any, checkpoint: Path) -> None:
    with joined(address(head), checkpoint, prefill=1, decode=1) as node:
        wait_until(head, 4)

        def kill(count: int) -> None:
            if count == 5:
                os.killpg(node.process.pid, signal.SIGKILL)

        ask_all(head, reference, "killed", traffic(3000, 16), kill)
        wait_until(head, 2)


def test_a_node_of_another_model_is_refused(head: RealCluster, checkpoint: Path) -> None:
    with joined(address(head), checkpoint, prefill=1, decode=1, block_tokens=32) as node:
        assert "block_tokens is 32, the cluster's is 16" in node.ends(2)


def test_a_node_that_finds_nobody_says_so(checkpoint: Path) -> None:
    with joined("127.0.0.1:9", checkpoint, prefill=1, decode=1) as node:
        assert "nobody answers at 127.0.0.1:9" in node.ends(2)
