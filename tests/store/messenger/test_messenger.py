"""The messenger over transports that fail: it brings the right bytes or raises in time, and leaves nobody writing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.core.errors import TransferError
from kvasir.store.arena import Arena
from kvasir.store.messenger import (
    Fetch,
    Fetched,
    Messenger,
    MessengerLimits,
    PeerArena,
    Place,
    Source,
    TcpServer,
    TcpTransport,
    Topology,
    Transport,
    host_identity,
)
from kvasir.store.messenger.faulty import FaultPlan, FaultyTransport
from tests.store.messenger.beds import LIMITS, NUM_SLOTS, SLOT_BYTES, filled, shm, soon, tcp

NUM_LAYERS = 6


@dataclass(frozen=True, slots=True)
class Cluster:
    """Two nodes that hold blocks and one, the target, that wants them."""

    arenas: tuple[Arena, Arena]
    servers: tuple[TcpServer, TcpServer]
    peers: tuple[PeerArena, PeerArena]
    target: Arena

    def sources(self, slots: tuple[int, ...]) -> tuple[Source, ...]:
        return tuple(Source(peer, slots) for peer in self.peers)


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        arenas = (filled(1), filled(1))  # replicas
        target = filled(2)
        for arena in (*arenas, target):
            stack.callback(arena.close)
        servers = (await TcpServer.start(arenas[0], "127.0.0.1"), await TcpServer.start(arenas[1], "127.0.0.1"))
        for server in servers:
            stack.push_async_callback(server.close)
        peers = [
            PeerArena(name, arena.handle, "elsewhere", tcp=server.address)
            for name, arena, server in zip(("near", "far"), arenas, servers, strict=True)
        ]
        yield Cluster(arenas, servers, (peers[0], peers[1]), target)


def messenger(*transports: Transport) -> Messenger:
    places = {"me": Place("a", "r"), "near": Place("b", "r"), "far": Place("c", "s")}
    limits = MessengerLimits(max_tries=8)
    return Messenger("me", transports, slot_bytes=SLOT_BYTES, num_layers=NUM_LAYERS, topology=Topology(places), limits=limits)


def holds(it: Cluster, there: tuple[int, ...], here: tuple[int, ...]) -> bool:
    return all(np.array_equal(it.target.slot(b), it.arenas[0].slot(a)) for a, b in zip(there, here, strict=True))


async def test_the_nearest_source_is_asked_and_layers_come_in_order() -> None:
    async with cluster() as it:
        there, here, layers = (3, 4, 9), (7, 2, 5), list[int]()
        bringer = messenger(tcp(it.target))

        def on_layer(count: int) -> None:
            layers.append(count)
            end = count * SLOT_BYTES // NUM_LAYERS
            for a, b in zip(there, here, strict=True):
                assert np.array_equal(it.target.slot(b)[:end], it.arenas[0].slot(a)[:end])

        sources = tuple(reversed(it.sources(there)))
        done = await bringer.fetch(Fetch(sources, here, soon(), on_layer=on_layer))
        assert (done.node, done.transport, done.tries, done.nbytes) == ("near", "tcp", 1, 3 * SLOT_BYTES)
        assert layers == sorted(layers)
        assert layers[-1] == NUM_LAYERS
        assert holds(it, there, here)
        stats = bringer.stats["tcp"]
        assert (stats.transfers, stats.nbytes, stats.active) == (1, 3 * SLOT_BYTES, 0)
        assert stats.bytes_s is not None
        await bringer.close()


async def test_shared_memory_is_preferred_on_one_machine() -> None:
    async with cluster() as it:
        peer = msgspec.structs.replace(it.peers[0], host=host_identity())
        bringer = Messenger("me", [shm(it.target), tcp(it.target)], slot_bytes=SLOT_BYTES, num_layers=1)
        done = await bringer.fetch(Fetch((Source(peer, (1,)),), (2,), soon()))
        assert done.transport == "shm"
        await bringer.close()


async def test_another_transport_takes_over_when_one_fails() -> None:
    async with cluster() as it:
        peer = msgspec.structs.replace(it.peers[0], host=host_identity())
        broken = FaultyTransport(shm(it.target), it.target, FaultPlan(cut=1.0), seed=1)
        bringer = Messenger("me", [broken, tcp(it.target)], slot_bytes=SLOT_BYTES, num_layers=1)
        done = await bringer.fetch(Fetch((Source(peer, (1, 2)),), (2, 3), soon()))
        assert (done.transport, done.tries) == ("tcp", 2)
        assert holds(it, (1, 2), (2, 3))
        assert bringer.stats["shm"].failures == {"cut": 1}
        assert bringer.stats["tcp"].retries == 1
        again = await bringer.fetch(Fetch((Source(peer, (1, 2)),), (2, 3), soon()))
        assert (again.transport, again.tries) == ("tcp", 1), "a path that failed rests"
        await bringer.close()


async def test_a_replica_is_asked_when_the_nearest_node_is_gone() -> None:
    async with cluster() as it:
        await it.servers[0].close()
        bringer = messenger(tcp(it.target))
        done = await bringer.fetch(Fetch(it.sources((1, 2)), (2, 3), soon()))
        assert done.node == "far"
        assert holds(it, (1, 2), (2, 3))
        await bringer.close()


async def test_no_other_source_is_asked_once_a_layer_was_told() -> None:
    async with cluster() as it:
        bringer, closing = messenger(tcp(it.target)), list[asyncio.Task[None]]()

        def on_layer(_: int) -> None:
            if not closing:
                closing.append(asyncio.create_task(it.servers[0].close()))

        slots = tuple(range(NUM_SLOTS))
        with pytest.raises(TransferError):
            await bringer.fetch(Fetch(it.sources(slots), slots, soon(), on_layer=on_layer))
        assert it.servers[1].counts.requests == 0
        await bringer.close()


async def test_a_fetch_that_outlives_its_soft_deadline_says_so_once() -> None:
    async with cluster() as it:
        slow = FaultyTransport(tcp(it.target), it.target, FaultPlan(delay=1.0), seed=1, delay_s=0.1)
        bringer, late = messenger(slow), list[str]()
        await bringer.fetch(Fetch(it.sources((1,)), (1,), soon(), late_s=soon(0.02), on_late=lambda: late.append("late")))
        await bringer.fetch(Fetch(it.sources((1,)), (1,), soon(), late_s=soon(5.0), on_late=lambda: late.append("never")))
        assert late == ["late"]
        await bringer.close()


async def test_a_batch_has_an_outcome_for_each_fetch() -> None:
    async with cluster() as it:
        gone = Source(
            msgspec.structs.replace(it.peers[0], arena=msgspec.structs.replace(it.peers[0].arena, id=b"0" * 16)), (0,)
        )
        bringer = messenger(tcp(it.target))
        good, bad = await bringer.fetch_all([Fetch(it.sources((5,)), (5,), soon()), Fetch((gone,), (6,), soon())])
        assert isinstance(good, Fetched)
        assert isinstance(bad, TransferError)
        assert bad.cause == "stale_arena"
        await bringer.close()


async def test_too_many_fetches_are_refused() -> None:
    async with cluster() as it:
        bringer = Messenger("me", [tcp(it.target)], slot_bytes=SLOT_BYTES, num_layers=1, limits=MessengerLimits(max_active=1))
        fetches = [Fetch(it.sources((slot,)), (slot,), soon()) for slot in range(2)]
        outcomes = await bringer.fetch_all(fetches)
        assert [type(outcome) for outcome in outcomes] == [Fetched, TransferError]
        await bringer.close()


PLANS = st.builds(
    FaultPlan,
    drop=st.floats(0, 0.15),
    delay=st.floats(0, 0.15),
    duplicate=st.floats(0, 0.15),
    stall=st.floats(0, 0.15),
    cut=st.floats(0, 0.2),
    corrupt_length=st.floats(0, 0.1),
)


@settings(max_examples=30, deadline=None)
@given(plan=PLANS, seed=st.integers(0, 1 << 30), cancel_after_s=st.none() | st.floats(0, 0.1), is_layered=st.booleans())
def test_a_fetch_brings_the_right_bytes_or_raises_in_time_and_then_nobody_writes(
    plan: FaultPlan, seed: int, cancel_after_s: float | None, is_layered: bool
) -> None:
    async def check() -> None:
        async with cluster() as it:
            slots = tuple(range(0, NUM_SLOTS, 2))
            others = [slot for slot in range(NUM_SLOTS) if slot not in slots]
            before = [it.target.slot(slot).copy() for slot in others]
            bringer = messenger(FaultyTransport(TcpTransport(it.target, LIMITS), it.target, plan, seed=seed))
            on_layer = (lambda _: None) if is_layered else None
            loop = asyncio.get_running_loop()
            deadline_s = loop.time() + 0.4
            task = asyncio.create_task(bringer.fetch(Fetch(it.sources(slots), slots, deadline_s, on_layer=on_layer)))
            if cancel_after_s is not None:
                loop.call_later(cancel_after_s, task.cancel)
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            assert loop.time() < deadline_s + 2.0
            assert isinstance(outcome, Fetched | TransferError | asyncio.CancelledError), outcome
            assert not isinstance(outcome, Fetched) or holds(it, slots, slots)
            assert all(np.array_equal(it.target.slot(slot), old) for slot, old in zip(others, before, strict=True))
            it.target.memory[:] = 77
            await asyncio.sleep(0.01)
            assert (it.target.memory == 77).all()
            assert bringer.stats["tcp"].active == 0
            await bringer.close()

    asyncio.run(check())
