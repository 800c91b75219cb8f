"""An engine's first steps before it serves: what is compiled or loaded at first use is then there, and its speed is known."""

from __future__ import annotations

from kvasir.cluster.pool_client import Pool
from kvasir.core.errors import KvasirError
from kvasir.engine.interface import Engine
from kvasir.engine.trial import decode_step, prefill_step
from kvasir.scheduling.batcher import Batcher

PATIENCE_S = 2.0
"""A whole chunk is only computed where it is not expected to take longer."""

BATCH = 8
"""Sequences in a decode step."""

MEASURED = 2
"""Steps of each phase after the first."""


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
    spec = engine.spec
    short = min(spec.block_tokens, spec.max_model_len)
    seconds = (await engine.step(prefill_step(spec, pages, short))).seconds
    length = min(chunk_tokens, len(pages) * spec.block_tokens, spec.max_model_len)
    length = length if seconds * length / short < PATIENCE_S else short
    for _ in range(MEASURED):
        result = await engine.step(prefill_step(spec, pages, length))
        batcher.saw([(length, 0, 1.0)], 0, 0, result.seconds)


async def _decode(engine: Engine, batcher: Batcher, pages: tuple[int, ...], max_batch: int) -> None:
    spec = engine.spec
    context = min(spec.block_tokens, spec.max_model_len)
    batch = min(BATCH, max_batch, len(pages))
    slices = decode_step(spec, pages, batch, context)
    await engine.step(slices)
    for _ in range(MEASURED):
        result = await engine.step(slices)
        batcher.saw([], batch, batch * context, result.seconds)
