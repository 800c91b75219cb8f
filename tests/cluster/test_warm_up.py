"""An instance's first steps: they tell its speed, return every page, and never stop it from serving."""

from __future__ import annotations

from typing import cast

import pytest
from msgspec.structs import replace

from kvasir.cluster.pool_client import Pool, attach_slots
from kvasir.cluster.warm_up import warm_up
from kvasir.core.errors import PoolError
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.engine.fake import FakeEngine
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.chunking import BatcherConfig
from kvasir.store.arena import create_arena
from tests.cluster.harness import BLOCK, SPEC
from tests.cluster.virtual_time import run_virtual

MODEL = FittedCost(PrefillFit(0.0, 1e-3, 0.0, 0.0), DecodeFit(0.01, 0.0, 0.0), 0.0, 1e9)


class Lender:
    """A pool that grants `count` pages at most, and remembers what came back."""

    def __init__(self, count: int):
        self.count = count
        self.granted: tuple[int, ...] = ()
        self.returned: tuple[int, ...] = ()

    async def reserve(self, count: int) -> tuple[int, ...]:
        if not self.count:
            raise PoolError("full")
        self.granted = tuple(range(min(count, self.count)))
        return self.granted

    def revoke(self, slots: tuple[int, ...]) -> None:
        self.returned = slots


class Watched(FakeEngine):
    longest = 0

    async def step(self, slices):  # type: ignore[no-untyped-def]
        self.longest = max(self.longest, *(len(s.tokens) for s in slices))
        return await super().step(slices)


def warmed(lender: Lender, *, prefill: float = 1.0, decode: float = 1.0, limit: int = 4096) -> tuple[Batcher, Watched]:
    truth = FittedCost(PrefillFit(0.0, prefill * 1e-3, 0.0, 0.0), DecodeFit(decode * 0.01, 0.0, 0.0), 0.0, 1e9)
    batcher = Batcher(BatcherConfig(block_tokens=BLOCK, max_step_tokens=256), MODEL)
    engine = Watched(replace(SPEC, max_model_len=limit), truth)

    async def scenario() -> None:
        engine.attach(attach_slots(create_arena(32, SPEC.slot_bytes)))
        await warm_up(engine, cast(Pool, lender), batcher, chunk_tokens=16 * BLOCK, max_batch=4)

    run_virtual(scenario())
    return batcher, engine


@pytest.mark.parametrize("pages", [16, 3, 1])
def test_it_measures_both_phases_and_returns_what_it_borrowed(pages: int) -> None:
    lender = Lender(pages)
    batcher, _ = warmed(lender, prefill=3.0, decode=7.0)
    load = batcher.load()
    assert load.prefill_scale == pytest.approx(3.0, rel=0.2)
    assert load.decode_scale == pytest.approx(5.6, rel=0.1)  # on its way: a step counts as four times what was expected at most
    assert lender.returned == lender.granted


def test_a_slow_engine_computes_one_block_only() -> None:
    _, slow = warmed(Lender(16), prefill=1000.0)
    _, fast = warmed(Lender(16))
    assert (slow.longest, fast.longest) == (BLOCK, 16 * BLOCK)


def test_where_the_pool_is_full_there_is_none() -> None:
    lender = Lender(0)
    batcher, engine = warmed(lender)
    assert (engine.longest, batcher.load().prefill_scale) == (0, None)


def test_no_prompt_is_longer_than_the_model_takes() -> None:
    _, engine = warmed(Lender(16), limit=BLOCK - 3)
    assert engine.longest == BLOCK - 3
