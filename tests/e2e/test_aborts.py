"""500 requests over HTTP, a third of them from clients that hang up: an idle cluster owns exactly the blocks of its index."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from random import Random

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvasir.cli.replay.completion import Endpoint, request_body
from kvasir.cli.replay.http import Server as Target
from kvasir.cli.replay.http import exchange
from tests.cli.test_serve import server

pytestmark = pytest.mark.timeout(240)

REQUESTS = 500
AT_ONCE = 24


async def one(target: Target, rng: Random, number: int) -> None:
    shared = [7 + number % 5] * 400
    prompt = shared[: rng.randrange(1, 400)] + [rng.randrange(10, 4000) for _ in range(rng.randrange(1, 200))]
    hangs_up = number % 3 == 0
    body = request_body(Endpoint.COMPLETIONS, "kvasir-small", prompt, rng.randrange(1, 80), ignore_eos=True)
    async with asyncio.timeout(60), exchange(target, "POST", "/v1/completions", body) as answer:
        assert answer.status == 200
        pieces = 0
        async for _ in answer.body():
            pieces += 1
            if hangs_up and pieces > number % 7:
                return


async def traffic(url: str) -> None:
    rng, target, gate = Random(1), Target.parse(url), asyncio.Semaphore(AT_ONCE)

    async def gated(number: int) -> None:
        async with gate:
            await one(target, rng, number)

    await asyncio.gather(*(gated(number) for number in range(REQUESTS)))


def pool_figures(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    figures = {s.labels["state"]: s.value for s in samples if s.name == "kvasir_pool_slots"}
    names = ("kvasir_pool_leases", "kvasir_pool_broken_invariants_total", "kvasir_pool_refusals_total")
    return figures | {s.name: s.value for s in samples if s.name in names}


def test_500_requests_with_clients_that_hang_up_leave_no_block_leased(tmp_path: Path) -> None:
    flags = [
        "--engine",
        "fake",
        "--admission",
        "off",
        "--dram",
        "24MiB",
        "--prefill",
        "1",
        "--decode",
        "1",
        "--mixed",
        "1",
        "--log-level",
        "warning",
    ]
    with server(flags, tmp_path) as found:
        asyncio.run(traffic(found.url))
        deadline = time.monotonic() + 20
        while (figures := pool_figures(found.url))["kvasir_pool_leases"] or figures["private"]:
            assert time.monotonic() < deadline, figures
            time.sleep(0.2)
        time.sleep(6.0)  # the pool checks itself every five seconds
        figures = pool_figures(found.url)
        assert figures["leased"] == figures["private"] == 0
        assert figures["kvasir_pool_broken_invariants_total"] == 0
        assert figures["kvasir_pool_refusals_total"] == 0
        assert figures["reserved"] <= 3 * 32  # the pages that idle instances keep in hand
        found.process.send_signal(signal.SIGINT)
        assert found.process.wait(20) == 0
