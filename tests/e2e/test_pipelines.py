"""Prompts that go through several processes, layer by layer, get the tokens of plain `transformers`, whatever dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvasir.cluster.config import ServeConfig
from kvasir.cluster.service import Submission
from tests.e2e.real import RealCluster, Said, answer, expect_same, greedy, idle, real_cluster
from tests.e2e.test_parity import BLOCK, OUTPUT, checkpoint, plain, prompt_of, reference

__all__ = ["checkpoint", "reference"]

pytestmark = pytest.mark.timeout(240)


@contextmanager
def cluster(checkpoint: Path, *, prefill: int, decode: int, mixed: int = 0) -> Iterator[RealCluster]:
    config = ServeConfig(
        model=str(checkpoint),
        dtype="float32",
        block_tokens=BLOCK,
        dram="64MiB",
        chunk_tokens=48,
        max_batch=16,
        stages=2,
        slo_ttft="5ms",  # all but short prompts are late on one instance
        log_level="warning",
        prefill=prefill,
        decode=decode,
        mixed=mixed,
    )
    with real_cluster(config) as found:
        yield found
        found.run(idle(found.hub))


@pytest.mark.parametrize(("prefill", "decode", "mixed"), [(2, 1, 0), (0, 0, 2)], ids=["2P+1D", "2M"])
def test_every_path_through_a_pipeline(checkpoint: Path, reference: Any, prefill: int, decode: int, mixed: int) -> None:
    with cluster(checkpoint, prefill=prefill, decode=decode, mixed=mixed) as found:

        def asks(name: str, prompt: list[int]) -> int:
            said, cached = found.run(answer(found.hub, greedy(name, prompt, OUTPUT)))
            expect_same(said, plain(reference, prompt), name)
            return cached

        for length in (100, 9 * BLOCK, 9 * BLOCK + 1, 333):
            assert asks(f"cold-{length}", prompt_of(length, length)) == 0
        shared = prompt_of(50, 200)
        for number in range(3):
            cached = asks(f"prefix-{number}", shared + prompt_of(60 + number, 120))
            assert cached == (0 if number == 0 else 200 // BLOCK * BLOCK)
        assert num_pipelines(found) >= 7

        async def all_at_once(prompts: list[list[int]]) -> list[tuple[Said, int]]:
            asked = [greedy(f"many-{number}", prompt, OUTPUT) for number, prompt in enumerate(prompts)]
            return await asyncio.gather(*(answer(found.hub, one) for one in asked))

        prompts = [(shared if number % 2 else []) + prompt_of(110 + number, 1 + 31 * number) for number in range(12)]
        for prompt, (said, _) in zip(prompts, found.run(all_at_once(prompts)), strict=True):
            expect_same(said, plain(reference, prompt))


def test_a_stage_that_is_killed_costs_no_token(checkpoint: Path, reference: Any) -> None:
    with cluster(checkpoint, prefill=2, decode=1) as found:
        for number, victim in enumerate(("prefill-0", "prefill-1", "prefill-0")):
            prompt = prompt_of(300 + number, 700)
            said = found.run(killed_in_mid_prefill(found, greedy(f"killed-{number}", prompt, OUTPUT), victim))
            expect_same(said, plain(reference, prompt))
            found.run(joined_again(found, victim))


async def killed_in_mid_prefill(found: RealCluster, asked: Submission, victim: str) -> Said:
    """The answer to a prompt one of whose stages dies at work."""
    before = num_pipelines(found)
    task = asyncio.create_task(answer(found.hub, asked))
    while num_pipelines(found) == before:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    os.kill(found.cluster.processes[victim], signal.SIGKILL)
    return (await task)[0]


async def joined_again(found: RealCluster, victim: str) -> None:
    async with asyncio.timeout(60.0):
        while victim not in {status.info.id for status in found.hub.status().instances}:
            await asyncio.sleep(0.05)


def num_pipelines(found: RealCluster) -> float:
    return found.hub.status().counters.get("pipelines", 0)
