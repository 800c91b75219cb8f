"""A cluster of real processes, without the gateway: what `kvasir serve` starts, driven from a test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from kvasir.cli.costs import load_costs
from kvasir.cluster.config import ServeConfig
from kvasir.cluster.hub import Clock, Hub, Send
from kvasir.cluster.local import LocalCluster, fit_to_pool
from kvasir.cluster.model import model_spec
from kvasir.cluster.service import Submission
from kvasir.core.request import Sampling, Slo
from kvasir.core.units import parse_duration
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.strategy import strategy

T = TypeVar("T")
START_S = 90.0
ROUNDING = 1e-4
"""Between float32 logprobs of different implementations."""


class RealCluster:
    """Runs in a thread of its own for as long as a test module needs it."""

    def __init__(self, config: ServeConfig):
        self._config = config
        self._started: Future[tuple[asyncio.AbstractEventLoop, LocalCluster]] = Future()
        self._thread = threading.Thread(target=self._main, name="cluster")
        self._thread.start()
        self._loop, self.cluster = self._started.result(START_S)

    @property
    def hub(self) -> Hub:
        return self.cluster.hub

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        """Run a coroutine in the cluster's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30.0)
        assert not self._thread.is_alive()

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        spec = fit_to_pool(model_spec(self._config), self._config)
        costs = load_costs(None, spec)
        conductor = (
            strategy(self._config.policy)
            .with_parts(admission="off", roles="static")
            .live(self._config.chunk_tokens)
            .conductor(
                ConductorConfig(
                    kv_bytes_per_token=spec.shape.kv_bytes_per_token,
                    block_tokens=spec.block_tokens,
                    load_bandwidth=self._config.ssd_read_bandwidth,
                    max_stages=self._config.stages,
                    stages_on_one_node=True,
                ),
                costs,
                Slo(parse_duration(self._config.slo_ttft)),
                Random(0),
            )
        )

        def make_hub(send: Send, clock: Clock) -> Hub:
            return Hub(spec, conductor, send=send, clock=clock, request_timeout_s=60.0)

        cluster = LocalCluster(self._config, spec, costs, make_hub, on_progress=lambda progress: None)
        async with cluster.running():
            await cluster.ready(START_S)
            self._started.set_result((asyncio.get_running_loop(), cluster))
            await self._stop.wait()


@contextmanager
def real_cluster(config: ServeConfig) -> Iterator[RealCluster]:
    found = RealCluster(config)
    try:
        yield found
    finally:
        found.stop()


@dataclass
class Said:
    """Greedy tokens and the logprob of each."""

    tokens: list[int]
    logprobs: list[float]


def expect_same(said: Said, expected: Said, about: str = "") -> None:
    """The same tokens, and logprobs that differ by no more than rounding.

    A wrong position of KV among some hundred often changes no token, because the likeliest is far ahead of the others.
    """
    assert said.tokens == expected.tokens, about
    worst = max(abs(a - b) for a, b in zip(said.logprobs, expected.logprobs, strict=True))
    assert worst < ROUNDING, f"{about}: same tokens, but a logprob differs by {worst:g}"


def greedy(request_id: str, prompt: list[int], max_tokens: int) -> Submission:
    return Submission(request_id, prompt, max_tokens, Sampling(temperature=0.0, logprobs=1), ignore_eos=True)


async def answer(hub: Hub, asked: Submission, on_token: Callable[[int], None] = lambda count: None) -> tuple[Said, int]:
    """What was said, and how many of the prompt's tokens came from cache."""
    said = Said([], [])
    cached = 0
    async for output in hub.submit(asked):
        for token in output.tokens:
            assert token.logprob is not None, "it was asked for"
            said.tokens.append(token.token)
            said.logprobs.append(token.logprob)
        cached = cached if output.cached_tokens is None else output.cached_tokens
        on_token(len(said.tokens))
    return said, cached


async def idle(hub: Hub) -> None:
    """Until every lease is closed, as the pool itself reports it; fails after a while."""
    async with asyncio.timeout(10.0):
        while any(stats.leases or stats.private or stats.leased for stats in hub.status().pools.values()):
            await asyncio.sleep(0.1)
