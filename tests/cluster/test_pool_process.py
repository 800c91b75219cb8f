"""The pool's bodies: one contract over every way to reach a pool, then a real process and everything that can befall it."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import zmq

from kvasir.cluster.bringer import Disk
from kvasir.cluster.disk import start_disk
from kvasir.cluster.lifeline import Lifeline, remove_runtime_directory, start_process
from kvasir.cluster.messages import BlocksChanged, HelloPool, OrderDone, PeerPool, PoolReport, PrefixPlan, Shutdown
from kvasir.cluster.pool_client import Pool, connect_pool, local_pool, open_pool
from kvasir.cluster.pool_host import HUB, HUB_EPOCH, MESSENGER, MESSENGER_EPOCH, PoolHost
from kvasir.cluster.pool_messages import FromPool, PoolCall, PoolReply, Resync, ToPool
from kvasir.cluster.pool_process import BAD_SETUP_EXIT, PoolBody, PoolConfig
from kvasir.cluster.wire import ZmqListener, ipc_address, make_runtime_directory
from kvasir.cluster.wire_memory import MemoryChannel, MemoryListener
from kvasir.core.errors import DeadlineExceeded, PoolError, StaleEpoch, UnknownLease
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import KeyedSlot, OwnerJoined, OwnerLost, PoolStats, PutStart, ReleaseLease, SsdBlock, SsdFound
from kvasir.pool.node import PoolNode
from kvasir.store.arena import create_arena
from kvasir.store.messenger import PeerArena
from kvasir.store.ssd import open_ssd

pytestmark = pytest.mark.timeout(60)

NUM_SLOTS = 8
START_S = 25.0
"""How long a process may take to start on a machine that is busy with other tests; half a second on an idle one."""
A, B = b"A" * 16, b"B" * 16

CALLS = msgspec.msgpack.Decoder(PoolCall)
REPLIES = msgspec.msgpack.Decoder(PoolReply)
TO_POOL: "msgspec.msgpack.Decoder[ToPool]" = msgspec.msgpack.Decoder(ToPool)
FROM_POOL: "msgspec.msgpack.Decoder[FromPool]" = msgspec.msgpack.Decoder(FromPool)


async def eventually(condition: Callable[[], bool], deadline_s: float = 5.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
async def host() -> AsyncIterator[PoolHost]:
    arena = create_arena(NUM_SLOTS, slot_bytes=100)
    host = PoolHost("n0", PoolNode(NUM_SLOTS), arena, asyncio.get_running_loop().time)
    yield host
    host.node.check()
    arena.close()


class BodyInMemory:
    """A running PoolBody whose peers are in this process."""

    def __init__(self, host: PoolHost, *, hub_limit: int = 64, disk: Disk | None = None):
        self.host = host
        self.instances: MemoryListener[PoolCall, PoolReply] = MemoryListener(CALLS)
        self.hub: MemoryListener[FromPool, ToPool] = MemoryListener(FROM_POOL, high_water_mark=hub_limit)
        hub: MemoryChannel[ToPool, FromPool] = MemoryChannel(self.hub, "pool@n0", TO_POOL)
        self.body = PoolBody(host, "n0", instances=self.instances, hub=hub, disk=disk)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["BodyInMemory"]:
        task = asyncio.create_task(self.body.run())
        yield self
        self.hub.send("pool@n0", Shutdown())
        await task

    def channel(self, name: str) -> MemoryChannel[PoolReply, PoolCall]:
        return MemoryChannel(self.instances, name, REPLIES)

    async def told(self) -> HelloPool | BlocksChanged:
        """What the hub hears next, reports aside."""
        while isinstance(message := (await self.hub.recv())[1], PoolReport | OrderDone):
            pass
        return message


@pytest.fixture(params=["in process", "over a channel"])
async def pools(request: pytest.FixtureRequest, host: PoolHost) -> AsyncIterator[tuple[Pool, Pool]]:
    """The pool as two instances see it, p and d, which have joined."""
    async with AsyncExitStack() as stack:
        if request.param == "in process":
            clock = asyncio.get_running_loop().time
            p, d = local_pool(host, "p", 1, clock), local_pool(host, "d", 1, clock)
        else:
            running = await stack.enter_async_context(BodyInMemory(host).running())
            p = await stack.enter_async_context(connect_pool(running.channel("p"), "p", 1))
            d = await stack.enter_async_context(connect_pool(running.channel("d"), "d", 1))
        await p.join()
        await d.join()
        yield p, d


# --- the contract ----------------------------------------------------------------------------------------------


async def test_joining_gives_the_slots_of_the_shared_arena(host: PoolHost, pools: tuple[Pool, Pool]) -> None:
    p, d = pools
    slots, same = await p.join(), await d.join()
    slots.memory[3 * slots.stride] = 77
    assert same.memory[3 * slots.stride] == 77
    assert host.arena.slot(3)[0] == 77


async def test_a_block_goes_from_hand_to_hand(pools: tuple[Pool, Pool]) -> None:
    p, d = pools
    (first, second) = await p.reserve(2)
    assert await p.lease("r1", [A]) == ()
    p.put_end("r1", [KeyedSlot(A, first)])
    await p.offer("r1", [second], ttl_s=5.0)
    assert await d.adopt("r1") == (first, second)
    assert await p.lease("r2", [A, B]) == (first,)


async def test_generations_grow_with_each_reservation(host: PoolHost, pools: tuple[Pool, Pool]) -> None:
    p, _ = pools
    (slot,) = await p.reserve(1)
    p.revoke([slot])
    assert await p.reserve(2) == (slot, slot + 1)
    assert host.arena.generations[:3].tolist() == [2, 1, 0]


async def test_refusals_are_typed_errors(pools: tuple[Pool, Pool]) -> None:
    p, d = pools
    await p.lease("r1", [])
    with pytest.raises(UnknownLease, match="not on offer"):
        await d.adopt("r1")
    with pytest.raises(PoolError, match="open already"):
        await d.lease("r1", [])
    with pytest.raises(PoolError, match=r"cannot offer slots \[5\]"):
        await p.offer("r1", [5], ttl_s=1.0)


async def test_an_older_incarnation_is_refused(host: PoolHost, pools: tuple[Pool, Pool]) -> None:
    p, _ = pools
    host.handle(OwnerJoined("p", 2))
    with pytest.raises(StaleEpoch, match="p epoch 1 is not here"):
        await p.reserve(1)


async def test_what_does_not_wait_is_done_in_order(host: PoolHost, pools: tuple[Pool, Pool]) -> None:
    p, _ = pools
    for _ in range(20):
        slots = await p.reserve(2)
        await p.lease("r1", [A])
        p.put_end("r1", [KeyedSlot(bytes([slots[0]]), slots[0])])
        p.release("r1", slots[1:])
    await p.lease("r1", [])
    assert host.node.stats().reserved == 0
    assert host.node.stats().refusals == 0


# --- when answers do not come ----------------------------------------------------------------------------------


async def test_a_silent_pool_is_a_deadline_exceeded() -> None:
    nobody: MemoryListener[PoolCall, PoolReply] = MemoryListener(CALLS)
    async with connect_pool(MemoryChannel(nobody, "p", REPLIES), "p", 1, timeout_s=0.02) as pool:
        with pytest.raises(DeadlineExceeded, match="did not answer PutStart within"):
            await pool.reserve(1)


async def test_slots_that_are_granted_too_late_go_back(host: PoolHost) -> None:
    slow: MemoryListener[PoolCall, PoolReply] = MemoryListener(CALLS)
    host.handle(OwnerJoined("p", 1))

    async def answer_next() -> None:
        _, call = await slow.recv()
        slow.send("p", PoolReply(call.id, host.ask(call.event)))

    async with connect_pool(MemoryChannel(slow, "p", REPLIES), "p", 1, timeout_s=0.02) as pool:
        with pytest.raises(DeadlineExceeded):
            await pool.reserve(3)
        await answer_next()
        assert host.node.stats().reserved == 3
        await answer_next()
        assert host.node.stats().reserved == 0


async def test_a_lease_call_that_is_cancelled_holds_nothing(host: PoolHost) -> None:
    async with BodyInMemory(host).running() as running, connect_pool(running.channel("p"), "p", 1) as pool:
        await pool.join()
        call = asyncio.create_task(pool.lease("r1", [A]))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await pool.lease("r1", [A]) == (), "the name is free again"
        assert host.node.stats().leases == 1


# --- what the hub hears ----------------------------------------------------------------------------------------


async def test_the_hub_hears_hello_and_then_counted_changes(host: PoolHost) -> None:
    async with BodyInMemory(host).running() as running, connect_pool(running.channel("p"), "p", 1) as p:
        assert await running.told() == HelloPool("n0", NUM_SLOTS)
        assert await running.told() == BlocksChanged("n0", 1, (), ())
        await p.join()
        await p.lease("r1", [])
        p.put_end("r1", [KeyedSlot(A, (await p.reserve(1))[0])])
        assert await running.told() == BlocksChanged("n0", 2, (A,), ())
        p.release("r1")
        await p.reserve(NUM_SLOTS)
        assert await running.told() == BlocksChanged("n0", 3, (), (A,))


async def test_a_hub_that_lost_track_is_told_everything_again(host: PoolHost) -> None:
    async with BodyInMemory(host).running() as running, connect_pool(running.channel("p"), "p", 1) as p:
        await p.join()
        await p.lease("r1", [])
        p.put_end("r1", [KeyedSlot(key, slot) for key, slot in zip((A, B), await p.reserve(2), strict=True)])
        while await running.told() != BlocksChanged("n0", 2, (A, B), ()):
            pass
        running.hub.send("pool@n0", Resync())
        assert await running.told() == HelloPool("n0", NUM_SLOTS)
        assert await running.told() == BlocksChanged("n0", 1, (A, B), ())


async def test_a_pool_that_is_reached_in_another_way_says_so_and_what_it_has_is_still_known() -> None:
    def reached_at(port: int) -> PeerPool:
        return PeerPool("n0", 1, f"tcp://127.0.0.1:{port}", PeerArena("n0", arena.handle, "here"))

    arena = create_arena(NUM_SLOTS, slot_bytes=100)
    ways = [reached_at(1)]
    host = PoolHost("n0", PoolNode(NUM_SLOTS), arena, asyncio.get_running_loop().time, peer=lambda: ways[-1])
    async with BodyInMemory(host).running() as running:
        assert await running.told() == HelloPool("n0", NUM_SLOTS, ways[0])
        assert await running.told() == BlocksChanged("n0", 1, (), ())
        host.handle(OwnerJoined("p", 1))
        await _put(local_pool(host, "p", 1, lambda: 0.0), A)
        assert await running.told() == BlocksChanged("n0", 2, (A,), ())
        ways.append(reached_at(2))
        assert await running.told() == HelloPool("n0", NUM_SLOTS, ways[1])
        assert await running.told() == BlocksChanged("n0", 1, (A,), ())
    arena.close()


async def test_at_an_orderly_end_what_is_not_on_the_ssd_yet_is_written_first(tmp_path: Path) -> None:
    num_blocks = 6
    arena = create_arena(NUM_SLOTS, slot_bytes=4096)
    host = PoolHost("n0", PoolNode(NUM_SLOTS, ssd_slots=8, max_spilling=1), arena, asyncio.get_running_loop().time)
    async with AsyncExitStack() as stack:
        disk = await start_disk(host, open_ssd(tmp_path, num_slots=8, slot_bytes=4096, identity="t"), stack)
        instances: MemoryListener[PoolCall, PoolReply] = MemoryListener(CALLS)
        hub: MemoryListener[FromPool, ToPool] = MemoryListener(FROM_POOL)
        channel: MemoryChannel[ToPool, FromPool] = MemoryChannel(hub, "pool@n0", TO_POOL)
        running = asyncio.create_task(PoolBody(host, "n0", instances=instances, hub=channel, disk=disk).run())
        await hub.recv()
        host.handle(OwnerJoined("p", 1))
        for number in range(num_blocks):
            await _put(local_pool(host, "p", 1, lambda: 0.0), bytes([number]) * 16)
        assert host.node.stats().spills_waiting, "one at a time"
        hub.send("pool@n0", Shutdown())
        await running
        assert host.node.stats().ssd_published == num_blocks
    arena.close()


async def test_a_lease_that_was_given_up_while_its_blocks_were_brought_is_not_left_open() -> None:
    class SlowDisk:
        def __init__(self) -> None:
            self.is_reading, self.may_end = asyncio.Event(), asyncio.Event()

        async def read(self, blocks: Sequence[tuple[int, BlockKey, int]]) -> tuple[int, ...]:
            self.is_reading.set()
            await self.may_end.wait()
            return ()

    disk, arena = SlowDisk(), create_arena(NUM_SLOTS, slot_bytes=100)
    host = PoolHost("n0", PoolNode(NUM_SLOTS, ssd_slots=8), arena, asyncio.get_running_loop().time)
    host.handle(SsdFound(MESSENGER, MESSENGER_EPOCH, (SsdBlock(A, 0, 0),)))
    async with BodyInMemory(host, disk=disk).running() as running, connect_pool(running.channel("p"), "p", 1) as p:
        await p.join()
        asked = asyncio.create_task(p.bring("r", [A], PrefixPlan(1, (), within_s=5.0)))
        await asyncio.wait_for(disk.is_reading.wait(), 5.0)
        asked.cancel()
        await p.lease("other", [])  # the pool has heard of it
        disk.may_end.set()
        await eventually(lambda: host.node.stats().published == 1 and host.node.stats().leases == 1)
        p.release("other")
        await eventually(lambda: host.node.stats().leases == 0)
        assert await p.lease("r", [A]) == (0,), "and the name is free again"
        p.release("r")
        await eventually(lambda: host.node.stats().leases == 0)
    host.node.check()
    arena.close()


def test_changes_that_the_hub_could_not_take_are_told_later_as_the_last_word(host: PoolHost) -> None:
    host.handle(OwnerJoined("p", 1))
    for key in (A, B):
        _publish_and_let_go(host, key)
    _evict_all(host)
    _publish_and_let_go(host, B)
    assert host.changes() == BlocksChanged("n0", 1, (B,), (A,))
    host.confirm_changes()
    assert host.changes() is None


def test_a_pool_that_is_far_behind_starts_over_instead_of_remembering_more(host: PoolHost) -> None:
    host.handle(OwnerJoined("p", 1))
    for number in range(3 * NUM_SLOTS):
        _publish_and_let_go(host, bytes([number]))
    changes = host.changes()
    assert changes is not None
    assert changes.seq == 1
    assert len(changes.stored + changes.removed) <= 2 * NUM_SLOTS
    assert set(changes.stored) == set(host.node.inventory())


async def test_a_hub_that_reads_nothing_costs_bounded_memory_and_no_service(host: PoolHost) -> None:
    async with BodyInMemory(host, hub_limit=2).running() as running, connect_pool(running.channel("p"), "p", 1) as p:
        await p.join()
        for number in range(10 * NUM_SLOTS):
            (slot,) = await p.reserve(1)
            await p.lease("r", [])
            p.put_end("r", [KeyedSlot(bytes([number]), slot)])
            p.release("r")
        known: set[bytes] = set()
        async with asyncio.timeout(5):
            while known != set(host.node.inventory()):
                match await running.told():
                    case HelloPool():
                        known.clear()
                    case BlocksChanged(stored=stored, removed=removed):
                        known = (known | set(stored)) - set(removed)


def _publish_and_let_go(host: PoolHost, key: bytes) -> None:
    pool = local_pool(host, "p", 1, lambda: 0.0)
    asyncio.run(_put(pool, key))


async def _put(pool: Pool, key: bytes) -> None:
    (slot,) = await pool.reserve(1)
    await pool.lease("r", [])
    pool.put_end("r", [KeyedSlot(key, slot)])
    pool.release("r")


def _evict_all(host: PoolHost) -> None:
    pool = local_pool(host, "p", 1, lambda: 0.0)

    async def reserve_and_revoke() -> None:
        pool.revoke(await pool.reserve(NUM_SLOTS))

    asyncio.run(reserve_and_revoke())


async def test_nobody_can_speak_in_another_s_name(host: PoolHost) -> None:
    async with BodyInMemory(host).running() as running:
        vandal = running.channel("vandal")
        host.handle(OwnerJoined("p", 1))
        vandal.send(PoolCall(PutStart("p", 1, 5), id=1))
        vandal.send(PoolCall(OwnerJoined("vandal", 1), id=2))
        assert (await vandal.recv()).id == 2
        assert host.node.stats().reserved == 0


# --- a real process --------------------------------------------------------------------------------------------


@dataclass
class Process:
    """A pool process, the hub's listener that it speaks to, and where to reach it."""

    config: PoolConfig
    process: asyncio.subprocess.Process
    hub: ZmqListener[FromPool, ToPool]

    async def stats(self) -> PoolStats:
        """The next report."""
        while True:
            _, message = await self.hub.recv()
            if isinstance(message, PoolReport):
                return message.stats

    async def stats_until(self, condition: Callable[[PoolStats], bool]) -> None:
        async with asyncio.timeout(START_S):
            while not condition(await self.stats()):
                pass


@pytest.fixture
def runtime() -> Iterator[Path]:
    directory = make_runtime_directory()
    yield directory
    remove_runtime_directory(directory)


def _config(runtime: Path, *, num_slots: int = NUM_SLOTS, slot_bytes: int = 1 << 20) -> PoolConfig:
    return PoolConfig(
        name="pool@n0",
        node="n0",
        listen=ipc_address(runtime, "pool"),
        hub=ipc_address(runtime, "hub"),
        num_slots=num_slots,
        slot_bytes=slot_bytes,
        runtime_directory=str(runtime),
    )


@pytest.fixture
async def pool_process(runtime: Path) -> AsyncIterator[Process]:
    config = _config(runtime)
    hub: ZmqListener[FromPool, ToPool] = ZmqListener(config.hub, FROM_POOL)
    lifeline = Lifeline()
    process = await start_process("kvasir.cluster.pool_process", config, lifeline=lifeline)
    yield Process(config, process, hub)
    hub.send(config.name, Shutdown())
    lifeline.close()
    async with asyncio.timeout(5):
        await process.wait()
    hub.close()


async def test_shutdown_ends_the_process_cleanly(pool_process: Process) -> None:
    assert (await pool_process.hub.recv())[1] == HelloPool("n0", NUM_SLOTS)
    pool_process.hub.send("pool@n0", Shutdown())
    assert await asyncio.wait_for(pool_process.process.wait(), 5) == 0


async def test_sigterm_ends_the_process_cleanly(pool_process: Process) -> None:
    await pool_process.hub.recv()
    pool_process.process.terminate()
    assert await asyncio.wait_for(pool_process.process.wait(), 5) == 0


async def test_instances_write_where_the_pool_s_process_keeps_the_bytes(pool_process: Process) -> None:
    async with (
        open_pool(pool_process.config.listen, "p", 1) as p,
        open_pool(pool_process.config.listen, "d", 1) as d,
    ):
        ours, theirs = await p.join(), await d.join()
        (slot,) = await p.reserve(1)
        ours.memory[slot * ours.stride : slot * ours.stride + 5] = list(b"hello")
        await p.lease("r1", [])
        p.put_end("r1", [KeyedSlot(A, slot)])
        await p.offer("r1", [], ttl_s=5.0)
        assert await d.adopt("r1") == (slot,)
        assert bytes(theirs.memory[slot * theirs.stride :][:5]) == b"hello"
        assert theirs.generations[slot] == 1


async def test_a_dead_instance_s_slots_come_back_when_the_hub_says_so(pool_process: Process) -> None:
    script = f"""
        import asyncio, os
        from kvasir.cluster.pool_client import open_pool

        async def main():
            async with open_pool({pool_process.config.listen!r}, "p", 1) as pool:
                await pool.join()
                await pool.reserve(5)
                os.kill(os.getpid(), 9)

        asyncio.run(main())
    """
    victim = await asyncio.create_subprocess_exec(sys.executable, "-c", textwrap.dedent(script))
    assert await asyncio.wait_for(victim.wait(), START_S) == -signal.SIGKILL
    await pool_process.stats_until(lambda stats: stats.reserved == 5)
    pool_process.hub.send("pool@n0", OwnerLost("p", 1))
    await pool_process.stats_until(lambda stats: (stats.free, stats.reserved) == (NUM_SLOTS, 0))


async def test_the_hub_withdraws_an_offer(pool_process: Process) -> None:
    async with open_pool(pool_process.config.listen, "p", 1) as p:
        await p.join()
        await p.lease("r1", [])
        await p.offer("r1", await p.reserve(2), ttl_s=60.0)
        await pool_process.stats_until(lambda stats: stats.private == 2)
        pool_process.hub.send("pool@n0", ReleaseLease(HUB, HUB_EPOCH, "r1"))
        await pool_process.stats_until(lambda stats: stats.free == NUM_SLOTS)


async def test_an_offer_expires_by_itself(pool_process: Process) -> None:
    async with open_pool(pool_process.config.listen, "p", 1) as p:
        await p.join()
        await p.lease("r1", [])
        await p.offer("r1", await p.reserve(2), ttl_s=0.2)
        await pool_process.stats_until(lambda stats: (stats.free, stats.expired_offers) == (NUM_SLOTS, 1))


async def test_garbage_on_the_socket_harms_nobody_else(pool_process: Process) -> None:
    await pool_process.hub.recv()
    socket: zmq.Socket[bytes]
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(pool_process.config.listen)
        for garbage in (b"", b"\xc1", b"GET / HTTP/1.1", b"\x91" * 10_000, msgspec.msgpack.encode(Shutdown())):
            socket.send(garbage)
        socket.send_multipart([b"one", b"two", b"three"])
    raw = await asyncio.open_unix_connection(pool_process.config.listen.removeprefix("ipc://"))
    raw[1].write(os.urandom(4096))
    raw[1].close()
    async with open_pool(pool_process.config.listen, "p", 1) as p:
        await p.join()
        assert len(await p.reserve(2)) == 2


async def test_a_killed_pool_leaves_no_memory_behind(pool_process: Process) -> None:
    await pool_process.hub.recv()
    pid = pool_process.process.pid
    assert [holder for holder in _arena_holders() if holder == pid]
    pool_process.process.kill()
    await pool_process.process.wait()
    assert pid not in _arena_holders()
    assert not [name for name in os.listdir("/dev/shm") if "kvasir" in name]


async def test_an_arena_that_does_not_fit_ends_with_one_line_and_its_own_status(runtime: Path) -> None:
    config = _config(runtime, num_slots=1 << 20, slot_bytes=1 << 30)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvasir.cluster.pool_process"),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await process.communicate(msgspec.json.encode(config))
    assert process.returncode == BAD_SETUP_EXIT
    assert stderr.decode().startswith("kvasir: pool@n0: arena of 1048576.0 GiB does not fit: ")
    assert len(stderr.splitlines()) == 1


def _arena_holders() -> set[int]:
    """Processes that have an arena open."""
    holders = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            targets = [os.readlink(fd) for fd in (process / "fd").iterdir()]
        except OSError:
            continue
        if any("memfd:kvasir-arena" in target for target in targets):
            holders.add(int(process.name))
    return holders


# --- lifeline --------------------------------------------------------------------------------------------------

PARENT = """
    import asyncio, sys
    from pathlib import Path
    from kvasir.cluster.lifeline import Lifeline, start_process
    from kvasir.cluster.pool_process import PoolConfig
    import msgspec

    async def main():
        config = msgspec.json.decode(sys.stdin.buffer.read(), type=PoolConfig)
        child = await start_process("kvasir.cluster.pool_process", config, lifeline=Lifeline())
        print(child.pid, flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
"""


async def test_a_killed_parent_takes_the_pool_and_its_sockets_along(runtime: Path) -> None:
    hub: ZmqListener[FromPool, ToPool] = ZmqListener(ipc_address(runtime, "hub"), FROM_POOL)
    parent = subprocess.Popen(  # noqa: ASYNC220 - a moment
        [sys.executable, "-c", textwrap.dedent(PARENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent:
        parent.stdin.write(msgspec.json.encode(_config(runtime)))
        parent.stdin.close()
        pid = int(parent.stdout.readline())
        async with asyncio.timeout(START_S):
            await hub.recv()
        parent.kill()
        started = time.monotonic()
        await eventually(lambda: not _is_running(pid))
        assert time.monotonic() - started < 2
    hub.close()
    await eventually(lambda: not runtime.exists())


STUCK = """
    import sys, time
    from kvasir.cluster.lifeline import run_child

    async def main():
        print("ready", flush=True)
        time.sleep(60)

    run_child(main, int(sys.argv[1]), grace_s=0.2)
"""


def test_a_child_that_is_stuck_dies_with_its_parent_all_the_same() -> None:
    lifeline = Lifeline()
    command = [sys.executable, "-c", textwrap.dedent(STUCK), str(lifeline.read_fd)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=(lifeline.read_fd,)) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        lifeline.close()
        assert child.wait(timeout=5) == 1


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
