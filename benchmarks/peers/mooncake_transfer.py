"""Mooncake's Transfer Engine over TCP loopback: `python -m benchmarks.peers.mooncake_transfer [MIB]`."""

from __future__ import annotations

import os
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.peers import timing
from benchmarks.peers.timing import require


def main() -> None:
    nbytes = timing.working_set()
    with timing.second_process(serve, nbytes) as (target, base):
        engine, memory = start(nbytes)
        here = timing.address(memory)
        one = {
            "put": (partial(single, engine.transfer_sync_write, target, here, base), 1),
            "get": (partial(single, engine.transfer_sync_read, target, here, base), 1),
            "put_batch16": (partial(batch, engine.batch_transfer_sync_write, target, here, base), timing.BATCH),
            "get_batch16": (partial(batch, engine.batch_transfer_sync_read, target, here, base), timing.BATCH),
        }
        timing.report(one, nbytes)


def serve(connection: Connection, nbytes: int) -> None:
    engine, memory = start(nbytes)
    connection.send((f"127.0.0.1:{engine.get_rpc_port()}", timing.address(memory)))
    timing.wait_for_end(connection)


def start(nbytes: int) -> tuple[Any, Any]:
    os.environ["MC_TCP_BIND_ADDRESS"] = "127.0.0.1"  # it listens everywhere by default
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    from mooncake.engine import TransferEngine  # reads the environment

    engine, memory = TransferEngine(), timing.warm(nbytes)
    require(engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""))
    require(engine.register_memory(timing.address(memory), nbytes))
    return engine, memory


def single(move: Any, target: str, here: int, base: int, offsets: list[int], size: int) -> None:
    require(move(target, here + offsets[0], base + offsets[0], size))


def batch(move: Any, target: str, here: int, base: int, offsets: list[int], size: int) -> None:
    require(move(target, [here + at for at in offsets], [base + at for at in offsets], [size] * len(offsets)))


if __name__ == "__main__":
    main()
