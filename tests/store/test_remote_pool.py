"""Pools of other processes: what appears there is right and complete, whoever dies, stalls or lies, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.core.errors import ConfigError, PoolError
from kvasir.core.tier import Tier
from kvasir.store import pool_server, pool_wire
from kvasir.store.mempool import MemPool
from kvasir.store.messenger import PeerArena, host_identity
from kvasir.store.messenger.faulty import FaultPlan
from kvasir.store.remote_pool import RemotePool

from .pool_peer import LISTEN, SIZE, failing, key, value
from .stopping import stop

PEER = Path(__file__).with_name("pool_peer.py")
STALL = FaultPlan(stall=1.0)


@pytest.fixture
def pool() -> Iterator[MemPool]:
    with served() as made:
        yield made


@contextlib.contextmanager
def served(**options: object) -> Iterator[MemPool]:
    """A pool of 8 blocks that others can use; at the end it is in order and all that they held is freed."""
    with MemPool(**{"num_blocks": 8, "block_bytes": SIZE, "listen": LISTEN, **options}) as made:  # type: ignore[arg-type]
        yield made
        wait_until(lambda: made.stats().reserved == 0)
        made.check()
        assert made.stats().leases == 0


@contextlib.contextmanager
def connected(pool: MemPool, **options: float) -> Iterator[RemotePool]:
    assert pool.address is not None
    with RemotePool(pool.address, **options) as other:
        yield other


@contextlib.contextmanager
def peer(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process; see pool_peer.py."""
    command = [sys.executable, str(PEER), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()
    return f"{host}:{port}"


def wait_until(is_so: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline_s, "it did not become so in time"
        time.sleep(0.01)


def giver(count: int = 4, size: int = SIZE) -> MemPool:
    """A pool with blocks 0 to `count`, at these addresses."""
    made = MemPool(num_blocks=8, block_bytes=size)
    addresses = made.alloc(count)
    assert addresses == tuple(range(count))
    for number in addresses:
        made.block(number)[:] = value(number)[:size]
    return made


def holds(pool: MemPool, numbers: range) -> bool:
    return all(np.array_equal(pool.get(key(n)), value(n)) for n in numbers)


# --- two processes that do as they should --------------------------------------------------------------------------


@pytest.mark.parametrize("is_here", [True, False], ids=["shared-memory", "tcp"])
def test_blocks_of_another_process_appear_here(pool: MemPool, is_here: bool) -> None:
    host, listen = (host_identity(), "") if is_here else ("elsewhere", LISTEN)
    with peer("send", str(pool.address), "6", host, listen) as sender:
        assert heard(sender) == "sent"
    assert holds(pool, range(6))


def test_a_giver_on_another_machine_that_does_not_listen_is_told_to(pool: MemPool) -> None:
    with peer("send", str(pool.address), "6", "elsewhere", "") as sender:
        assert (
            heard(sender) == f"pool at {pool.address}: the giver is on another machine and has no address; make it with listen="
        )
    assert pool.exists(key(0)) is None


def test_another_process_holds_a_replica_which_can_be_got_from_there() -> None:
    with peer("receive", "0") as receiver, RemotePool(heard(receiver)) as other, giver() as pool:
        pool.insert([key(n) for n in range(4)], range(4))
        pool.change_replica(key(2), [other])
        pool.change_replica(key(2), [other])
        assert (other.exists(key(2)), other.exists(key(1))) == (Tier.DRAM, None)
        assert np.array_equal(other.get(key(2)), value(2))
        with pytest.raises(PoolError, match=f"pool at {other.address}: block {key(1).hex()} is not here"):
            other.get(key(1))


def test_what_is_on_the_ssd_of_a_remote_pool_can_be_got(tmp_path: Path) -> None:
    with served(num_blocks=2, ssd_path=tmp_path, ssd_blocks=8) as pool, connected(pool) as other:
        for number in range(4):
            pool.put(key(number), value(number))
            pool.flush()
        assert other.exists(key(0)) is Tier.SSD
        assert np.array_equal(other.get(key(0)), value(0))


def test_memserves_calls_work_one_by_one(pool: MemPool) -> None:
    with giver() as here, connected(pool) as other:
        target = other.alloc(2)
        here.transfer(other, [3, 1], target)
        other.insert([key(3), key(1)], target)
        unused = other.alloc(3)
        other.free(unused)
        assert (holds(pool, range(1, 2)), holds(pool, range(3, 4)), pool.stats().reserved) == (True, True, 0)


def test_threads_share_a_connection_or_have_their_own() -> None:
    failures: list[BaseException] = []

    def work(to: RemotePool, first: int) -> None:
        try:
            for number in range(first, first + 10):
                here.transfer_with_insert(to, [key(number)], [number % 4])
        except BaseException as error:
            failures.append(error)

    with served(num_blocks=64) as pool, giver() as here, connected(pool) as one, connected(pool) as two:
        threads = [threading.Thread(target=work, args=(to, 10 * at)) for at, to in enumerate([one, one, two])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        assert not failures
        assert all(np.array_equal(pool.get(key(n)), value(n % 4)) for n in range(30))


# --- what ends in the middle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_here", [True, False], ids=["shared-memory", "tcp"])
def test_a_sender_that_is_killed_leaves_nothing(is_here: bool) -> None:
    host, listen = (host_identity(), "") if is_here else ("elsewhere", LISTEN)
    with failing(STALL), served() as pool:
        with peer("send", str(pool.address), "6", host, listen) as sender:
            wait_until(lambda: pool.stats().reserved == 6)
            sender.kill()
        wait_until(lambda: pool.stats().reserved == 0)
        assert all(pool.exists(key(n)) is None for n in range(6))
        pool.batch_put([key(n) for n in range(8)], [value(n) for n in range(8)])  # all room is there again
        assert holds(pool, range(8))


def test_a_receiver_that_is_killed_is_an_error_at_the_sender() -> None:
    with peer("receive", "1") as receiver, RemotePool(heard(receiver)) as other, giver() as pool:
        threading.Timer(0.3, receiver.kill).start()
        with pytest.raises(PoolError, match=f"pool at {other.address}: is gone"):
            pool.transfer_with_insert(other, [key(n) for n in range(4)], range(4))
        with pytest.raises(PoolError, match="has lost this connection; open another one"):
            other.exists(key(0))
        with pytest.raises(PoolError, match=f"pool at {other.address}: (cannot be reached|is gone)"):
            RemotePool(other.address)
        pool.check()


def test_a_receiver_that_stands_still_is_not_waited_for_and_frees_when_it_goes_on() -> None:
    with peer("receive", "0") as receiver, RemotePool(heard(receiver), timeout_s=1.0) as other, giver() as pool:
        other.alloc(3)
        stop(receiver.pid)
        with pytest.raises(PoolError, match="did not answer within 1 s"):
            pool.transfer_with_insert(other, [key(0)], [0])
        os.kill(receiver.pid, signal.SIGCONT)

        def reserved() -> str:
            assert receiver.stdin is not None
            print("well?", file=receiver.stdin, flush=True)
            return heard(receiver)

        wait_until(lambda: reserved() == "0")


def test_a_pull_that_stalls_ends_before_its_sender_gives_up() -> None:
    with failing(STALL), served() as pool, giver() as here, connected(pool, timeout_s=1.0) as other:
        with pytest.raises(PoolError, match="nothing came until the deadline"):
            here.transfer_with_insert(other, [key(0)], [0])
        assert (pool.stats().reserved, other.exists(key(0))) == (0, None)


def test_a_pool_that_is_closed_in_the_middle_ends_the_transfer() -> None:
    with failing(STALL), giver() as here:
        pool = MemPool(num_blocks=8, block_bytes=SIZE, listen=LISTEN)
        with connected(pool) as other:
            closing = threading.Timer(0.2, pool.close)
            closing.start()
            with pytest.raises(PoolError, match=r"is gone|was closed"):
                here.transfer_with_insert(other, [key(0)], [0])
            closing.join()


def test_a_pool_that_started_again_knows_no_addresses_of_before() -> None:
    with giver() as here:
        with served() as pool, connected(pool) as other:
            address = str(pool.address)
            target = other.alloc(2)
            here.transfer(other, [0, 1], target)
            pool.close()
            with pytest.raises(PoolError, match="is gone"):
                other.insert([key(0), key(1)], target)
        with served(listen=address) as again:
            with pytest.raises(PoolError, match="has lost this connection"):
                other.insert([key(0), key(1)], target)
            with connected(again) as another:
                here.transfer_with_insert(another, [key(0)], [0])
            assert holds(again, range(1))


def test_a_giver_that_is_closed_is_noticed(pool: MemPool) -> None:
    here = giver()
    here.close()
    with connected(pool) as other, pytest.raises(PoolError, match="arena of node process-"):
        here.transfer_with_insert(other, [key(0)], [0])


def test_what_came_once_but_not_again_is_not_inserted(pool: MemPool) -> None:
    gone = giver()
    gone.close()
    with giver() as here, connected(pool) as other:
        target = other.alloc(1)
        here.transfer(other, [0], target)
        with pytest.raises(PoolError, match="arena of node process-"):
            gone.transfer(other, [0], target)
        with pytest.raises(PoolError, match="did not come completely"):
            other.insert([key(0)], target)


def test_what_is_left_unfinished_is_freed(pool: MemPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_server, "UNFINISHED_S", 0.1)
    with connected(pool) as other, connected(pool) as idle:
        other.alloc(5)
        wait_until(lambda: pool.stats().reserved == 0)
        with pytest.raises(PoolError, match="is gone"):
            other.exists(key(0))
        assert idle.exists(key(0)) is None  # holds nothing, so it may rest


# --- what makes no sense -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda here, other: here.transfer_with_insert(other, [b"short"], [0]), "key of 5 bytes, expected 16"),
        (lambda here, other: here.transfer_with_insert(other, [key(0)], [0, 1]), "1 keys for 2 addresses"),
        (lambda here, other: here.transfer_with_insert(other, [key(0)], [8]), "lies outside of the arenas"),
        (lambda here, other: here.transfer_with_insert(other, [key(n) for n in range(9)], [0] * 9), "no room for 9 blocks"),
        (lambda here, other: here.transfer(other, [0], [3]), r"addresses \[3\] are not allocated over this connection"),
        (lambda here, other: other.insert([key(0)], other.alloc(1)), r"addresses \[0\] .* did not come completely"),
        (lambda here, other: other.free([7]), r"addresses \[7\] are not allocated"),
        (lambda here, other: other.alloc(-1), "did not|said|is gone"),
        (lambda here, other: other.put(key(0), np.zeros(3, np.uint8)), f"3 bytes, contiguous: expected {SIZE}"),
        (lambda here, other: other.put(b"short", value(0)), "key of 5 bytes, expected 16"),
        (lambda here, other: other.match([b"short"]), "key of 5 bytes, expected 16"),
        (lambda here, other: other.delete([b"short"]), "key of 5 bytes, expected 16"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    pool: MemPool, wrong: Callable[[MemPool, RemotePool], None], told: str
) -> None:
    with giver() as here, connected(pool) as other, pytest.raises(PoolError, match=f"pool at {other.address}: .*({told})"):
        wrong(here, other)
    wait_until(lambda: pool.stats().free == 8)


def test_blocks_are_put_matched_and_deleted_over_a_connection(pool: MemPool) -> None:
    with connected(pool) as other:
        for n in range(3):
            other.put(key(n), value(n).reshape(2, -1))
        assert other.match([key(0), key(1), key(9), key(2)]) == 2
        assert np.array_equal(other.get(key(2)), value(2))
        assert np.array_equal(pool.get(key(0)), value(0))
        other.delete([key(1), key(9)])
        assert (other.match([key(0), key(1)]), pool.exists(key(1)), pool.exists(key(2))) == (1, None, Tier.DRAM)


def test_what_is_only_on_the_ssd_is_matched_too(tmp_path: Path) -> None:
    with served(num_blocks=2, ssd_path=tmp_path, ssd_blocks=8) as pool, connected(pool) as other:
        for n in range(4):
            other.put(key(n), value(n))
            pool.flush()
        assert other.match([key(n) for n in range(4)]) == 4
        assert [bytes(other.get(key(n))) for n in range(4)] == [value(n).tobytes() for n in range(4)]


def test_a_block_of_many_mebibytes_is_put() -> None:
    with served(num_blocks=2, block_bytes=20 << 20) as pool, connected(pool) as other:
        block = np.arange(5 << 20, dtype=np.uint32)
        other.put(key(0), block)
        assert np.array_equal(other.get(key(0)).view(np.uint32), block)


def test_pools_of_other_blocks_do_not_fit(pool: MemPool) -> None:
    with giver(size=64) as here, connected(pool) as other:
        with pytest.raises(PoolError, match="1 of 64 bytes to 1 of 4608"):
            here.transfer_with_insert(other, [key(0)], [0])
        other.block_bytes = 64  # a client that lies
        with pytest.raises(PoolError, match="do not fit each other"):
            here.transfer_with_insert(other, [key(0)], [0])


def test_a_connection_has_no_say_over_what_another_allocated(pool: MemPool) -> None:
    with connected(pool) as one, connected(pool) as two, giver() as here:
        target = one.alloc(1)
        with pytest.raises(PoolError, match="are not allocated over this connection"):
            two.free(target)
        with pytest.raises(PoolError, match="are not allocated over this connection"):
            two.insert([key(0)], target)
        with pytest.raises(PoolError, match="are not allocated over this connection"):
            here.transfer(two, [0], target)


GARBAGE = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "half a frame": pool_wire.LENGTH.pack(100) + b"x" * 50,
    "no message": pool_wire.LENGTH.pack(4) + b"\xc1\xc1\xc1\xc1",
    "nested": pool_wire.LENGTH.pack(100_000) + b"\x91" * 100_000,
    "an answer, or a request": pool_wire.pack(pool_wire.Found(Tier.DRAM)),
}


@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_client_that_speaks_garbage_harms_only_itself(pool: MemPool, said: bytes) -> None:
    assert pool.address is not None
    with connected(pool) as other:
        with socket.create_connection(pool_wire.split_address(pool.address), timeout=10.0) as liar:
            liar.sendall(pool_wire.pack(pool_wire.Alloc(3)))
            wait_until(lambda: pool.stats().reserved == 3)
            liar.sendall(said)
            liar.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while liar.recv(1 << 16):
                    pass
        wait_until(lambda: pool.stats().reserved == 0)
        assert other.exists(key(0)) is None


def test_a_giver_that_cannot_be_harms_only_itself(pool: MemPool) -> None:
    class Liar:
        peer = PeerArena("liar", pool.peer.arena, "elsewhere", tcp="127.0.0.1:99999")

    with connected(pool) as liar, connected(pool) as other:
        target = liar.alloc(1)
        with pytest.raises(PoolError):
            liar.receive(Liar(), [0], target)  # type: ignore[arg-type]
        assert other.exists(key(0)) is None


@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_server_that_speaks_garbage_is_an_error(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def lie() -> None:
            liar, _ = listening.accept()
            with liar:
                liar.sendall(said)

        thread = threading.Thread(target=lie)
        thread.start()
        address = address_of(listening)
        with pytest.raises(PoolError, match=f"pool at {address}: (is gone|said|answered)"):
            RemotePool(address, timeout_s=10.0)
        thread.join()


def test_a_server_that_says_nothing_is_not_waited_for() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        pytest.raises(PoolError, match=r"did not answer within 0\.2 s"),
    ):
        RemotePool(address_of(listening), timeout_s=0.2)


def test_more_connections_than_can_be_are_refused(pool: MemPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_server, "MAX_CONNECTIONS", 1)
    with connected(pool), pytest.raises(PoolError, match="the pool has 1 connections and takes no more"):
        RemotePool(str(pool.address))


@pytest.mark.parametrize(
    ("listen", "told"),
    [("7401", "expected HOST:PORT"), ("0.0.0.0:0", "the address at which others reach"), ("192.0.2.1:0", "cannot listen")],
)
def test_an_address_that_cannot_be_listened_on_is_refused(listen: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        MemPool(num_blocks=1, block_bytes=SIZE, listen=listen)
    with MemPool(num_blocks=1, block_bytes=SIZE) as unheard:
        assert unheard.address is None


# --- anything at all -----------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(st.sampled_from(["send", "alloc", "transfer", "insert", "free", "leave"]), st.integers(0, 7)), max_size=25
)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 1000))
def test_whatever_fails_what_appears_is_right_and_nothing_is_left(steps: list[tuple[str, int]], seed: int) -> None:
    """Block n is at address n % 4 of the giver."""
    plan = FaultPlan(cut=0.6, corrupt_length=0.1, duplicate=0.1)  # one in four transfers fails in all four tries
    with failing(plan, seed), served(num_blocks=6) as pool, giver() as here:
        other = RemotePool(str(pool.address))
        held: list[tuple[int, int]] = []
        for step, number in steps:
            with contextlib.suppress(PoolError):
                match step:
                    case "send":
                        here.transfer_with_insert(other, [key(number), key(number + 1)], [number % 4, (number + 1) % 4])
                    case "alloc":
                        held += [(address, number) for address in other.alloc(2)]
                    case "transfer":
                        here.transfer(other, [n % 4 for _, n in held], [address for address, _ in held])
                    case "insert" if held:
                        address, n = held[number % len(held)]
                        other.insert([key(n)], [address])
                        held.remove((address, n))
                    case "free" if held:
                        other.free([held.pop(number % len(held))[0]])
                    case "leave":
                        other.close()
                        other, held = RemotePool(str(pool.address)), []
            for n in range(9):
                if pool.exists(key(n)) is not None:
                    assert np.array_equal(pool.get(key(n)), value(n % 4))
        pool.check()
        other.close()
