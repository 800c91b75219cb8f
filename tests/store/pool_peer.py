"""The other process of test_remote_pool.py: `receive` serves an empty pool, `send` transfers its blocks to a pool."""

from __future__ import annotations

import contextlib
import sys
from unittest import mock

import numpy as np

from kvasir.core.errors import PoolError
from kvasir.core.keys import KEY_BYTES
from kvasir.store import mempool, pool_server
from kvasir.store.arena import Arena
from kvasir.store.mempool import Bytes, MemPool
from kvasir.store.messenger import ShmTransport, TcpTransport
from kvasir.store.messenger.faulty import FaultPlan, FaultyTransport
from kvasir.store.remote_pool import RemotePool

SIZE = 4096 + 512
LISTEN = "127.0.0.1:0"


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def value(number: int) -> Bytes:
    return np.random.default_rng(number).integers(0, 256, SIZE, dtype=np.uint8)


def failing(plan: FaultPlan, seed: int = 0) -> contextlib.AbstractContextManager[object]:
    """Pool servers that start meanwhile pull over a network like this."""

    def wrapped(kind: type[ShmTransport] | type[TcpTransport]) -> object:
        def make(arena: Arena) -> FaultyTransport:
            return FaultyTransport(kind(arena), arena, plan, seed=seed)

        return make

    return mock.patch.multiple(pool_server, ShmTransport=wrapped(ShmTransport), TcpTransport=wrapped(TcpTransport))


def receive(stall: str) -> None:
    """Says the address; at each line that comes, whether the pool is in order and how many blocks are allocated."""
    with failing(FaultPlan(stall=float(stall))), MemPool(num_blocks=32, block_bytes=SIZE, listen=LISTEN) as pool:
        print(pool.address, flush=True)
        for _ in sys.stdin:
            pool.check()
            print(pool.stats().reserved, flush=True)


def send(address: str, count: str, host: str, listen: str) -> None:
    """Says what came of transferring blocks 0 to `count`. With another `host` there is no shared memory between us."""
    numbers = range(int(count))
    with MemPool(num_blocks=32, block_bytes=SIZE, listen=listen or None) as pool, RemotePool(address, timeout_s=2.0) as other:
        pool.batch_put([key(n) for n in numbers], [value(n) for n in numbers])
        with pool.match([key(n) for n in numbers]) as found, mock.patch.object(mempool, "host_identity", return_value=host):
            try:
                pool.transfer_with_insert(other, [key(n) for n in numbers], found.addresses)
                print("sent", flush=True)
            except PoolError as error:
                print(error, flush=True)
        pool.check()


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "receive":
        receive(*arguments)
    else:
        send(*arguments)
