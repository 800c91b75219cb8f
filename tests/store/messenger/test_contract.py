"""What every transport promises, run over every transport."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.core.errors import TransferError
from kvasir.store.arena import Arena
from kvasir.store.messenger import SpanPair, Transport
from kvasir.store.messenger.faulty import FaultPlan, FaultyTransport
from tests.store.messenger.beds import NUM_SLOTS, SLOT_BYTES, bed, expected, shm, soon, tcp

Make = Callable[[Arena], Transport]


def faulty(target: Arena) -> Transport:
    """With an empty plan it is what it wraps."""
    return FaultyTransport(tcp(target), target, FaultPlan(), seed=1)


MAKES: dict[str, Make] = {"shm": shm, "tcp": tcp, "faulty": faulty}
if importlib.util.find_spec("nixl") is not None:
    from kvasir.store.messenger.nixl import NixlTransport

    MAKES["nixl"] = NixlTransport

pytestmark = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


@st.composite
def span_lists(draw: st.DrawFn) -> list[SpanPair]:
    """Spans that do not overlap in the target: each has a local slot of its own, or a part of one."""
    spans = []
    for local_slot in draw(st.lists(st.integers(0, NUM_SLOTS - 1), unique=True, max_size=NUM_SLOTS)):
        edges = sorted(draw(st.lists(st.integers(0, SLOT_BYTES), min_size=2, max_size=6, unique=True)))
        for start, end in pairwise(edges):
            if draw(st.booleans()):
                spans.append(SpanPair(draw(st.integers(0, NUM_SLOTS - 1)), local_slot, start, end - start))
    return draw(st.permutations(spans))


@settings(max_examples=40, deadline=None)
@given(spans=span_lists())
def test_any_spans_arrive_and_no_other_byte_is_touched(make: Make, spans: list[SpanPair]) -> None:
    async def check() -> None:
        async with bed(make) as it:
            after = expected(it.target.memory, it.source, spans)
            await it.transport.read(it.peer, spans, deadline_s=soon())
            assert np.array_equal(it.target.memory, after)

    asyncio.run(check())


async def test_parts_are_told_in_order_and_only_when_their_bytes_are_there(make: Make) -> None:
    spans = [SpanPair(slot, NUM_SLOTS - 1 - slot, 0, SLOT_BYTES) for slot in range(NUM_SLOTS)]
    told: list[int] = []
    async with bed(make) as it:

        def on_part(count: int) -> None:
            told.append(count)
            for remote_slot, local_slot, _, _ in spans[:count]:
                assert np.array_equal(it.target.slot(local_slot), it.source.slot(remote_slot))

        await it.transport.read(it.peer, spans, deadline_s=soon(), on_part=on_part)
    assert told == sorted(told)
    assert told[-1] == NUM_SLOTS


async def test_what_on_part_raises_ends_the_read(make: Make) -> None:
    spans = [SpanPair(slot, slot, 0, SLOT_BYTES) for slot in range(NUM_SLOTS)]

    def on_part(_: int) -> None:
        raise ValueError("no")

    async with bed(make) as it:
        with pytest.raises(ValueError, match="no"):
            await it.transport.read(it.peer, spans, deadline_s=soon(), on_part=on_part)


@pytest.mark.parametrize(
    "bad",
    [
        SpanPair(NUM_SLOTS, 0, 0, 1),
        SpanPair(0, NUM_SLOTS, 0, 1),
        SpanPair(-1, 0, 0, 1),
        SpanPair(0, -1, 0, 1),
        SpanPair(0, 0, SLOT_BYTES, 1),
        SpanPair(0, 0, -1, 2),
        SpanPair(0, 0, 1, SLOT_BYTES),
        SpanPair(0, 0, 0, 0),
        SpanPair(0, 0, 8, -4),
        SpanPair(0, 0, 1, (1 << 63) - 1),
    ],
)
async def test_spans_outside_of_the_arenas_are_refused_before_a_byte_moves(make: Make, bad: SpanPair) -> None:
    async with bed(make) as it:
        before = it.target.memory.copy()
        with pytest.raises(TransferError, match="outside of the arenas") as raised:
            await it.transport.read(it.peer, [SpanPair(0, 1, 0, 100), bad], deadline_s=soon())
        assert raised.value.cause == "out_of_range"
        assert np.array_equal(it.target.memory, before)


async def test_another_incarnation_of_the_arena_is_refused(make: Make) -> None:
    async with bed(make) as it:
        before = it.target.memory.copy()
        stale = msgspec.structs.replace(it.peer, arena=msgspec.structs.replace(it.peer.arena, id=bytes(16)))
        with pytest.raises(TransferError) as raised:
            await it.transport.read(stale, [SpanPair(0, 0, 0, 100)], deadline_s=soon())
        assert raised.value.cause == "stale_arena"
        assert np.array_equal(it.target.memory, before)


async def test_many_reads_at_a_time_do_not_mix(make: Make) -> None:
    spans = [[SpanPair((7 * slot) % NUM_SLOTS, slot, 0, SLOT_BYTES)] for slot in range(NUM_SLOTS)]
    async with bed(make) as it:
        after = expected(it.target.memory, it.source, [span for one in spans for span in one])
        await asyncio.gather(*(it.transport.read(it.peer, one, deadline_s=soon()) for one in spans))
        assert np.array_equal(it.target.memory, after)


async def test_a_cancelled_read_writes_nothing_after_it_ended(make: Make) -> None:
    spans = [SpanPair(slot, slot, 0, SLOT_BYTES) for slot in range(NUM_SLOTS)]
    async with bed(make) as it:
        for turns in range(12):
            task = asyncio.create_task(it.transport.read(it.peer, spans, deadline_s=soon()))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            it.target.memory[:] = turns  # the slots are somebody else's now
            await asyncio.sleep(0.005)
            assert (it.target.memory == turns).all()
        after = expected(it.target.memory, it.source, spans)
        await it.transport.read(it.peer, spans, deadline_s=soon())
        assert np.array_equal(it.target.memory, after), "and the next read is not disturbed"


async def test_a_read_whose_deadline_is_over_says_so(make: Make) -> None:
    spans = [SpanPair(slot, slot, 0, SLOT_BYTES) for slot in range(NUM_SLOTS)]
    async with bed(make) as it:
        with pytest.raises(TransferError) as raised:
            await it.transport.read(it.peer, spans, deadline_s=soon(-1.0))
        assert raised.value.cause == "stalled"


async def test_a_closed_transport_ends_its_reads_and_takes_no_more(make: Make) -> None:
    spans = [SpanPair(slot, slot, 0, SLOT_BYTES) for slot in range(NUM_SLOTS)]
    async with bed(make) as it:
        task = asyncio.create_task(it.transport.read(it.peer, spans, deadline_s=soon()))
        await asyncio.sleep(0)
        await it.transport.close()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert outcome is None or isinstance(outcome, TransferError)
        with pytest.raises(TransferError):
            await it.transport.read(it.peer, spans, deadline_s=soon())


async def test_no_bytes_are_no_work(make: Make) -> None:
    async with bed(make) as it:
        await it.transport.read(it.peer, [], deadline_s=soon())


async def test_reaches_says_whether_there_is_a_path(make: Make) -> None:
    async with bed(make) as it:
        assert it.transport.reaches(it.peer)
        elsewhere = msgspec.structs.replace(it.peer, host="another machine", tcp=None, nixl=None)
        assert not it.transport.reaches(elsewhere)
