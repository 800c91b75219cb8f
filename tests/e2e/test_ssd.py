"""The SSD tier under a real cluster: tokens equal plain `transformers` whatever was evicted, read back, rotten or restarted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvasir.cluster.config import ServeConfig
from tests.e2e.real import RealCluster, answer, expect_same, greedy, idle, real_cluster
from tests.e2e.test_parity import BLOCK, OUTPUT, checkpoint, plain, prompt_of, reference

__all__ = ["checkpoint", "reference"]

pytestmark = pytest.mark.timeout(240)

LENGTH = 24 * BLOCK + 5
"""Ten of such prompts do not fit into the DRAM of these tests, and fit into the SSD."""


@contextmanager
def cluster(checkpoint: Path, disk: Path) -> Iterator[RealCluster]:
    config = ServeConfig(
        model=str(checkpoint),
        dtype="float32",
        block_tokens=BLOCK,
        dram="1920KiB",
        ssd="64MiB",
        ssd_path=str(disk),
        ssd_read="100000GB",  # or it would be faster to compute this model's blocks than to read them
        mixed=1,
        policy="mooncake",
        chunk_tokens=48,
        max_batch=16,
        log_level="warning",
    )
    with real_cluster(config) as found:
        yield found


def ask(found: RealCluster, reference: Any, name: str, seed: int) -> int:
    """Checks the answer; how many tokens of the prompt came from cache."""
    prompt = prompt_of(seed, LENGTH)
    said, cached = found.run(answer(found.hub, greedy(name, prompt, OUTPUT)), 120.0)
    expect_same(said, plain(reference, prompt), f"{name}, {cached} tokens cached")
    return cached


def stats(found: RealCluster) -> Any:
    return next(iter(found.hub.status().pools.values()))


def settle(found: RealCluster) -> None:
    """Until all that was published is on the SSD too."""

    async def written() -> None:
        import asyncio

        await idle(found.hub)
        async with asyncio.timeout(20.0):
            while (now := stats(found)).spills_waiting or now.writing:
                await asyncio.sleep(0.2)
            await asyncio.sleep(1.2)  # a report is a second old at most

    found.run(written(), 40.0)


def test_what_left_dram_comes_back_from_the_ssd_and_survives_restarts(checkpoint: Path, reference: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    whole = LENGTH // BLOCK * BLOCK
    with cluster(checkpoint, disk) as found:
        for seed in range(12):
            assert ask(found, reference, f"cold-{seed}", 500 + seed) == 0
        settle(found)
        assert stats(found).evictions > 0
        assert ask(found, reference, "again", 500) == whole
        settle(found)
        assert stats(found).loaded > 0
    with cluster(checkpoint, disk) as found:
        assert ask(found, reference, "restarted", 501) == whole
        os.kill(next(pid for name, pid in found.cluster.processes.items() if name.startswith("pool")), signal.SIGKILL)
    with cluster(checkpoint, disk) as found:
        for seed in range(502, 506):
            assert ask(found, reference, f"killed-{seed}", seed) == whole


def test_blocks_that_rot_on_the_disk_are_dropped_counted_and_computed_again(
    checkpoint: Path, reference: Any, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with cluster(checkpoint, disk) as found:
        for seed in range(6):
            ask(found, reference, f"cold-{seed}", 600 + seed)
        settle(found)
    rot(disk)
    with cluster(checkpoint, disk) as found:
        cached = [ask(found, reference, f"rotten-{seed}", 600 + seed) for seed in range(6)]
        assert sum(cached) < 6 * (LENGTH // BLOCK * BLOCK)
        settle(found)
        assert stats(found).failed_loads > 0


def test_processes_that_stand_still_at_any_moment_cost_no_token(checkpoint: Path, reference: Any, tmp_path: Path) -> None:
    """Reads come late and race with computing; blocks are evicted while they are written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with cluster(checkpoint, disk) as found:
        for seed in range(8):
            ask(found, reference, f"cold-{seed}", 700 + seed)
        rng = Random(7)
        with stopping_and_going_on(list(found.cluster.processes.values()), Random(8)):
            cached = [ask(found, reference, f"stopped-{number}", 700 + rng.randrange(8)) for number in range(20)]
        assert sum(cached) > 0
        settle(found)
        assert stats(found).loaded > 0


@contextmanager
def stopping_and_going_on(processes: list[int], rng: Random) -> Iterator[None]:
    """Meanwhile one process after another stands still for up to a third of a second, longer than a block may take to come."""
    is_over = threading.Event()

    def disturb() -> None:
        while not is_over.wait(rng.random() * 0.02):
            process = rng.choice(processes)
            os.kill(process, signal.SIGSTOP)
            is_over.wait(rng.random() * rng.choice([0.002, 0.02, 0.3]))
            os.kill(process, signal.SIGCONT)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def rot(disk: Path) -> None:
    """Flip a bit in every fourth page of everything there but the first."""
    rng = Random(1)
    for path in disk.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                for page in range(4, path.stat().st_size // 4096, 4):
                    at = page * 4096 + rng.randrange(4096)
                    file.seek(at)
                    byte = file.read(1)
                    file.seek(at)
                    file.write(bytes([byte[0] ^ 16]))
