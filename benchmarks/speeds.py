"""How fast a service is at the moment, in seconds, from a few requests that have it to themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from statistics import fmean

import numpy as np

from benchmarks.serving import System, stream
from kvasir.cli.replay.completion import StreamReading

LONE_PROMPT, LONE_OUTPUT, NUM_LONE = 256, 96, 5
CROWD, CROWD_OUTPUT = 8, 192
BESIDE_PROMPT, BESIDE_OUTPUT, NUM_BESIDE = 4096, 2048, 3
CLIENTS, NUM_EACH = 3, 6
EDGE_S = 0.02
"""Gaps this near to the ends of a prefill may be half beside it."""

NUM_FACTORS = 40


@dataclass(frozen=True)
class Speeds:
    """Means of: TTFT and token gap of a request that is alone; the gap of CROWD requests at a time; TTFT of a long prompt alone
    and beside a stream. And of some clients who ask what the load asks, one thing after the other: the gap while there are
    prefills, in batches of `batch_beside` with `context_beside` tokens, and how much longer the first one is. `factors`:
    quantiles of the gaps beside a long prompt over their mean.
    """

    first_s: float
    gap_s: float
    crowd_gap_s: float
    prompt_s: float
    prompt_beside_s: float
    gap_beside_s: float
    batch_beside: float
    context_beside: float
    hand_off_s: float
    factors: tuple[float, ...]

    def between(self, other: Speeds) -> Speeds:
        """Of a time between this and the other."""
        mean = {name: (value + getattr(other, name)) / 2 for name, value in vars(self).items() if name != "factors"}
        return Speeds(**mean, factors=tuple(map(fmean, zip(self.factors, other.factors, strict=True))))


@dataclass(frozen=True)
class Lengths:
    """Tokens of a request."""

    prompt: int
    output: int


def sample(lengths: Sequence[Lengths]) -> list[Lengths]:
    """As many as clients ask for, short and long ones as in all of them."""
    count, in_order = CLIENTS * NUM_EACH, sorted(lengths, key=lambda each: each.prompt)
    return [in_order[(2 * i + 1) * len(in_order) // (2 * count)] for i in range(count)]


async def measure(system: System, asked: Sequence[Lengths]) -> Speeds:
    """`asked`: by the clients. Takes some ten seconds; the prompts are new each time, their order is the same."""
    rng, order = Random(), Random(0)
    lone = [await stream(system, _prompt(rng, LONE_PROMPT), LONE_OUTPUT) for _ in range(NUM_LONE)]
    some = await asyncio.gather(*(stream(system, _prompt(rng, LONE_PROMPT), CROWD_OUTPUT) for _ in range(CROWD)))
    begin, end = max(times[0] for _, times in some), min(times[-1] for _, times in some)
    crowd = [gap for _, times in some for gap in _gaps([at for at in times if begin <= at <= end])]
    prompts = [await _prefill(system, rng) for _ in range(NUM_BESIDE)]
    beside, even = await _beside_a_stream(system, rng)
    shuffled = order.sample(list(asked), len(asked))
    clients = [_client(system, rng, shuffled[i::CLIENTS]) for i in range(CLIENTS)]
    gaps = _beside_prefills([answer for answers in await asyncio.gather(*clients) for answer in answers])
    first, later = [gap for gap in gaps if gap.is_first], [gap for gap in gaps if not gap.is_first]
    if not first or not later:
        raise RuntimeError("no token came while others' prompts were computed")
    gap_beside_s = fmean([gap.seconds for gap in later])
    quantiles = np.quantile(even, (np.arange(NUM_FACTORS) + 0.5) / NUM_FACTORS)
    return Speeds(
        first_s=fmean([times[0] - sent for sent, times in lone]),
        gap_s=fmean([gap for _, times in lone for gap in _gaps(times)[1:]]),
        crowd_gap_s=fmean(crowd),
        prompt_s=fmean([end - begin for begin, end in prompts]),
        prompt_beside_s=fmean([end - begin for begin, end in beside]),
        gap_beside_s=gap_beside_s,
        batch_beside=fmean([gap.batch for gap in later]),
        context_beside=fmean([gap.context for gap in later]),
        hand_off_s=max(0.0, fmean([gap.seconds for gap in first]) - gap_beside_s),
        factors=tuple((quantiles / quantiles.mean()).tolist()),
    )


async def _prefill(system: System, rng: Random) -> tuple[float, float]:
    """When a long prompt was sent, and when its first token came."""
    while True:
        sent, times = await stream(system, _prompt(rng, BESIDE_PROMPT), 1)
        if times:  # a part of a character is not sent
            return sent, times[0]


async def _beside_a_stream(system: System, rng: Random) -> tuple[list[tuple[float, float]], list[float]]:
    """NUM_BESIDE long prompts, one after the other, beside a stream, which is cut off then; its gaps meanwhile."""
    reading = StreamReading()
    async with asyncio.TaskGroup() as tasks:
        streaming = tasks.create_task(stream(system, _prompt(rng, LONE_PROMPT), BESIDE_OUTPUT, reading))
        while not reading.token_times_s():
            await asyncio.sleep(0.01)
        prefills = [await _prefill(system, rng) for _ in range(NUM_BESIDE)]
        if streaming.done():
            raise RuntimeError(f"{NUM_BESIDE} prompts took longer than {BESIDE_OUTPUT} tokens")
        streaming.cancel()
    spans = [(begin + EDGE_S, end - EDGE_S) for begin, end in prefills]
    pairs = list(pairwise(reading.token_times_s()))
    return prefills, [later - earlier for begin, end in spans for earlier, later in pairs if begin <= earlier and later <= end]


@dataclass(frozen=True)
class _Answer:
    lengths: Lengths
    sent: float
    times: list[float]


async def _client(system: System, rng: Random, asked: Sequence[Lengths]) -> list[_Answer]:
    """Asks for one thing after the other."""
    return [_Answer(each, *await stream(system, _prompt(rng, each.prompt), each.output)) for each in asked]


@dataclass(frozen=True)
class _Gap:
    """`batch` were decoding, with `context` tokens in all."""

    seconds: float
    is_first: bool
    batch: int
    context: int


def _beside_prefills(answers: Sequence[_Answer]) -> list[_Gap]:
    """Gaps during which somebody else's prefill was under way."""
    gaps = []
    for answer in answers:
        for number, (earlier, later) in enumerate(pairwise(answer.times)):
            if any(other.sent <= earlier and later <= other.times[0] for other in answers):
                decoding = [other for other in answers if other.times[0] <= earlier and later <= other.times[-1]]
                context = sum(other.lengths.prompt for other in decoding)
                gaps.append(_Gap(later - earlier, not number, len(decoding), context))
    return gaps


def _gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def _prompt(rng: Random, length: int) -> list[int]:
    return [rng.randrange(1000, 4000) for _ in range(length)]
