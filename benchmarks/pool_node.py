"""How long the pool's brain takes per block: `python -m benchmarks.pool_node`; microseconds, best of several rounds."""

from __future__ import annotations

import json
import time

from kvasir.core.keys import block_keys, root_key
from kvasir.core.pool_events import (
    KeyedSlot,
    LeaseBlocks,
    OwnerJoined,
    PoolAnswer,
    PoolEvent,
    PutEnd,
    PutStart,
    ReleaseLease,
    Reserved,
)
from kvasir.pool.node import PoolNode

NUM_BLOCKS = 2048
"""Blocks of one sequence: a prompt of 128 Ki tokens in blocks of 64."""

NUM_SLOTS = 4 * NUM_BLOCKS
ROUNDS = 20


def measure() -> dict[str, float]:
    """Microseconds per block of each operation, on a node that is full of other sequences' blocks."""
    node = PoolNode(NUM_SLOTS)
    node.handle(OwnerJoined("p", 1), 0.0)
    for salt in range(NUM_SLOTS // NUM_BLOCKS):  # fill it: from then on each reservation evicts
        _run_one(node, _keys(salt))
    rounds = [_run_one(node, _keys(NUM_SLOTS + salt)) for salt in range(ROUNDS)]
    node.check()
    return {name: round(min(seconds[name] for seconds in rounds) / NUM_BLOCKS * 1e6, 3) for name in rounds[0]}


def _run_one(node: PoolNode, keys: tuple[bytes, ...]) -> dict[str, float]:
    """Seconds to reserve (evicting), publish, match and release one sequence."""
    seconds: dict[str, float] = {}

    def timed(name: str, event: PoolEvent) -> list[PoolAnswer]:
        start = time.perf_counter()
        answers = node.handle(event, 0.0)
        seconds[name] = time.perf_counter() - start
        return answers

    reserved = timed("reserve_evict", PutStart("p", 1, NUM_BLOCKS))[-1]
    assert isinstance(reserved, Reserved)
    node.handle(LeaseBlocks("p", 1, "write", ()), 0.0)
    timed("put_end", PutEnd("p", 1, "write", tuple(map(KeyedSlot, keys, reserved.slots))))
    node.handle(ReleaseLease("p", 1, "write"), 0.0)
    fresh = tuple(bytes(bytearray(key)) for key in keys)  # keys from the wire have not been hashed yet
    timed("lease", LeaseBlocks("p", 1, "read", fresh))
    timed("release", ReleaseLease("p", 1, "read"))
    return seconds


def _keys(salt: int) -> tuple[bytes, ...]:
    root = root_key(model="m", dtype="bfloat16", layout="l", block_tokens=1, salt=str(salt))
    return tuple(block_keys(root, range(NUM_BLOCKS), 1))


def main() -> None:
    print(json.dumps({"unit": "us per block", "blocks": NUM_BLOCKS, **measure()}))


if __name__ == "__main__":
    main()
