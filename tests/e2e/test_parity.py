"""Greedy tokens of a real cluster equal those of plain `transformers` in float32, token for token, on every path.

So do their logprobs up to rounding, which see a wrong position of KV where no token does.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvasir.cluster.config import ServeConfig
from kvasir.engine.random_model import make_checkpoint
from kvasir.engine.torch.first_calls import make_first_calls
from tests.e2e.real import RealCluster, Said, answer, expect_same, greedy, idle, real_cluster

pytestmark = pytest.mark.timeout(240)

BLOCK = 16
OUTPUT = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model") / "nano"
    make_checkpoint(path, family="qwen3", size="nano", seed=3)
    return path


ON_GPU = pytest.param("1P+1D, GPU", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"))


@pytest.fixture(scope="module", params=["1P+1D", "1M", ON_GPU])
def cluster(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[RealCluster]:
    prefill, decode, mixed = (0, 0, 1) if request.param == "1M" else (1, 1, 0)
    config = ServeConfig(
        model=str(checkpoint),
        dtype="float32",
        block_tokens=BLOCK,
        dram="64MiB",
        prefill=prefill,
        decode=decode,
        mixed=mixed,
        chunk_tokens=48,
        max_batch=16,
        policy="mooncake",
        device="cuda" if "GPU" in request.param else "cpu",
        log_level="warning",
    )
    with real_cluster(config) as found:
        yield found
        found.run(idle(found.hub))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    make_first_calls()
    torch.set_num_threads(1)  # the model is tiny; threads would only wait for each other
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


def plain(reference: Any, prompt: list[int], count: int = OUTPUT) -> Said:
    """Greedy decoding by transformers, nothing else."""
    with torch.no_grad():
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = out.sequences[0, len(prompt) :]
    logprobs = torch.cat(out.logits).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    return Said(tokens.tolist(), logprobs.tolist())


def prompt_of(seed: int, length: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(3, 380) for _ in range(length)]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 150])
def test_cold(cluster: RealCluster, reference: Any, length: int) -> None:
    prompt = prompt_of(length, length)
    said, cached = cluster.run(answer(cluster.hub, greedy(f"cold-{length}", prompt, OUTPUT)))
    expect_same(said, plain(reference, prompt))
    assert cached == 0


def test_cached_prefix(cluster: RealCluster, reference: Any) -> None:
    shared = prompt_of(50, 100)
    for number in range(3):
        prompt = shared + prompt_of(60 + number, 30)
        said, cached = cluster.run(answer(cluster.hub, greedy(f"prefix-{number}", prompt, OUTPUT)))
        expect_same(said, plain(reference, prompt))
        assert cached == (0 if number == 0 else 100 // BLOCK * BLOCK)


def test_a_prompt_that_is_cached_to_its_last_block(cluster: RealCluster, reference: Any) -> None:
    prompt = prompt_of(70, 8 * BLOCK)
    for number in range(2):
        said, cached = cluster.run(answer(cluster.hub, greedy(f"whole-{number}", prompt, OUTPUT)))
        expect_same(said, plain(reference, prompt))
        assert cached == (0 if number == 0 else 7 * BLOCK)


def test_many_turns_over_blocks_that_decode_wrote(cluster: RealCluster, reference: Any) -> None:
    history = prompt_of(80, 40)
    for turn in range(4):
        said, cached = cluster.run(answer(cluster.hub, greedy(f"turn-{turn}", history, OUTPUT)))
        expect_same(said, plain(reference, history))
        assert cached == (0 if turn == 0 else (len(history) - 10 - 1) // BLOCK * BLOCK)
        history = history + said.tokens + prompt_of(90 + turn, 10)


def test_concurrent_requests_of_all_lengths(cluster: RealCluster, reference: Any) -> None:
    shared = prompt_of(100, 64)
    prompts = [(shared if number % 2 else []) + prompt_of(110 + number, 1 + 13 * number) for number in range(16)]

    async def all_at_once() -> list[tuple[Said, int]]:
        asked = [greedy(f"many-{number}", prompt, OUTPUT) for number, prompt in enumerate(prompts)]
        return await asyncio.gather(*(answer(cluster.hub, one) for one in asked))

    for prompt, (said, _) in zip(prompts, cluster.run(all_at_once()), strict=True):
        expect_same(said, plain(reference, prompt))


def test_clients_that_go_away_free_their_blocks(cluster: RealCluster) -> None:
    async def go_away(number: int) -> None:
        asked = greedy(f"gone-{number}", prompt_of(200 + number, 60), 400)
        async with aclosing(cluster.hub.submit(asked)) as outputs:
            async for _ in outputs:
                if number % 3:
                    break
                await asyncio.sleep(0.01)
                break

    async def all_at_once() -> None:
        await asyncio.gather(*(go_away(number) for number in range(12)))
        await idle(cluster.hub)

    cluster.run(all_at_once())


def test_an_instance_that_is_killed_in_mid_stream_costs_no_token(cluster: RealCluster, reference: Any) -> None:
    """The last of this module: the instance that decodes dies, comes back, and the stream goes on."""
    victim = next(name for name in cluster.cluster.processes if name.startswith(("decode", "mixed")))
    prompt = prompt_of(300, 90)

    def kill(count: int) -> None:
        if count == 5:
            os.kill(cluster.cluster.processes[victim], signal.SIGKILL)

    async def one() -> tuple[Said, int]:
        return await answer(cluster.hub, greedy("survivor", prompt, 100), kill)

    expect_same(cluster.run(one())[0], plain(reference, prompt, 100))
