"""An engine's first steps before it serves: what is compiled or loaded at first use is then there, and its speed is known."""

from __future__ import annotations

import asyncio

import numpy as np

from kvasir.cluster.pool_client import Pool
from kvasir.core.errors import KvasirError
from kvasir.core.request import Sampling
from kvasir.engine.interface import Engine, SequenceSlice
from kvasir.scheduling.batcher import Batcher

PATIENCE_S = 2.0
"""A whole chunk is only computed where it is not expected to take longer."""

BATCH = 8
"""Sequences in a decode step."""

MEASURED = 2
"""Steps of each phase after the first."""

_GREEDY = Sampling(temperature=0.0)


async def warm_up(engine: Engine, pool: Pool, batcher: Batcher, *, chunk_tokens: int, max_batch: int) -> None:
    """Prefill and decode on borrowed pages, first to warm up, then for the batcher to see how long it takes."""
    try:
        pages = await pool.reserve(-(-chunk_tokens // engine.spec.block_tokens))
    except KvasirError:
        return  # others hold all of it: then requests warm the engine up
    try:
        if pages:
            await _prefill(engine, batcher, pages, chunk_tokens)
            await _decode(engine, batcher, pages, max_batch)
    finally:
        pool.revoke(pages)


async def _prefill(engine: Engine, batcher: Batcher, pages: tuple[int, ...], chunk_tokens: int) -> None:
    block_tokens, limit = engine.spec.block_tokens, engine.spec.max_model_len
    short = min(block_tokens, limit)
    seconds = await _seconds(engine, [_chunk(engine, pages, short)])
    length = min(chunk_tokens, len(pages) * block_tokens, limit)
    length = length if seconds * length / short < PATIENCE_S else short
    for _ in range(MEASURED):
        batcher.saw([(length, 0)], 0, 0, await _seconds(engine, [_chunk(engine, pages, length)]))


async def _decode(engine: Engine, batcher: Batcher, pages: tuple[int, ...], max_batch: int) -> None:
    context = min(engine.spec.block_tokens, engine.spec.max_model_len)
    batch = min(BATCH, max_batch, len(pages))
    slices = [SequenceSlice(f"warm-{n}", [n + 1], context - 1, [pages[n]], _GREEDY) for n in range(batch)]
    await engine.step(slices)
    for _ in range(MEASURED):
        batcher.saw([], batch, batch * context, await _seconds(engine, slices))


def _chunk(engine: Engine, pages: tuple[int, ...], length: int) -> SequenceSlice:
    tokens = np.arange(length, dtype=np.uint32) % engine.spec.shape.vocab
    return SequenceSlice("warm", tokens, 0, pages[: -(-length // engine.spec.block_tokens)], _GREEDY)


async def _seconds(engine: Engine, slices: list[SequenceSlice]) -> float:
    clock = asyncio.get_running_loop().time
    started_s = clock()
    await engine.step(slices)
    return clock() - started_s
