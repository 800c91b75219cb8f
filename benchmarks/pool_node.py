"""How long the pool's brain takes per block: `python -m benchmarks.pool_node`; microseconds, best of several rounds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial

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
    Spill,
    SpillDone,
)
from kvasir.costs.roofline import reference_cost
from kvasir.pool.cost_aware import block_seconds
from kvasir.pool.directory import BlockDirectory
from kvasir.pool.node import PoolNode
from kvasir.pool.policies import EVICTIONS

NUM_BLOCKS = 2048
"""Blocks of one sequence: a prompt of 128 Ki tokens in blocks of 64."""

NUM_SLOTS = 4 * NUM_BLOCKS
ROUNDS = 20


def measure() -> dict[str, object]:
    """Microseconds per block of each operation on a full node, by eviction policy and with an SSD; and of the directory."""
    seconds = block_seconds(reference_cost(), 64)
    by_policy = {name: _measure_node(PoolNode(NUM_SLOTS, make(seconds))) for name, make in EVICTIONS.items()}
    with_ssd = _measure_node(PoolNode(NUM_SLOTS, ssd_slots=2 * NUM_SLOTS, max_spilling=NUM_BLOCKS))
    return {**by_policy, "lru, with SSD": with_ssd, "directory": _measure_directory()}


def _measure_node(node: PoolNode) -> dict[str, float]:
    """Microseconds per block, on a node that is full of other sequences' blocks."""
    node.handle(OwnerJoined("p", 1), 0.0)
    fill = NUM_SLOTS // NUM_BLOCKS
    for salt in range(fill):  # from then on each reservation evicts
        _run_one(node, _keys(salt), float(salt))
    rounds = [_run_one(node, _keys(NUM_SLOTS + salt), float(fill + salt)) for salt in range(ROUNDS)]
    node.check()
    return {name: round(min(seconds[name] for seconds in rounds) / NUM_BLOCKS * 1e6, 3) for name in rounds[0]}


def _run_one(node: PoolNode, keys: tuple[bytes, ...], now: float) -> dict[str, float]:
    """Seconds to reserve (evicting), publish, match and release one sequence, and to account for its writes to the SSD."""
    seconds: dict[str, float] = {}

    def timed(name: str, event: PoolEvent) -> list[PoolAnswer]:
        start = time.perf_counter()
        answers = node.handle(event, now)
        seconds[name] = time.perf_counter() - start
        return answers

    reserved = timed("reserve_evict", PutStart("p", 1, NUM_BLOCKS))
    slots = next(answer.slots for answer in reserved if isinstance(answer, Reserved))
    node.handle(LeaseBlocks("p", 1, "write", ()), now)
    published = timed("put_end", PutEnd("p", 1, "write", tuple(map(KeyedSlot, keys, slots))))
    node.handle(ReleaseLease("p", 1, "write"), now)
    fresh = tuple(bytes(bytearray(key)) for key in keys)  # keys from the wire have not been hashed yet
    timed("lease", LeaseBlocks("p", 1, "read", fresh))
    timed("release", ReleaseLease("p", 1, "read"))
    if spills := [answer for answer in published if isinstance(answer, Spill)]:
        start = time.perf_counter()
        for spill in spills:
            node.handle(SpillDone("p", 1, spill.ssd_slot, True), now)
        seconds["spill_done"] = time.perf_counter() - start
    return seconds


def _measure_directory() -> dict[str, float]:
    """Microseconds: `match` of a whole prompt that five of sixteen nodes have, others per key; among 200,000 other blocks."""
    directory = BlockDirectory()
    for number in range(16):
        directory.stored(f"n{number}", 1, ())
    for salt in range(100):
        directory.stored("n0", 2 + salt, _keys(salt))
    keys = _keys(1000)
    for number in range(1, 6):
        directory.stored(f"n{number}", 2, keys)
    news = [_keys(2000 + salt) for salt in range(ROUNDS)]
    stored = [_timed(partial(directory.stored, "n6", 2 + i, new)) for i, new in enumerate(news)]
    removed = [_timed(partial(directory.removed, "n6", 2 + ROUNDS + i, new)) for i, new in enumerate(news)]
    figures = {"stored_per_key": min(stored) / NUM_BLOCKS, "removed_per_key": min(removed) / NUM_BLOCKS}
    for count in (256, NUM_BLOCKS):
        figures[f"match_{count}"] = min(_timed(partial(directory.match, keys[:count])) for _ in range(ROUNDS))
        fresh = [tuple(bytes(bytearray(key)) for key in keys[:count]) for _ in range(ROUNDS)]
        figures[f"match_{count}_of_keys_never_hashed"] = min(_timed(partial(directory.match, some)) for some in fresh)
    directory.check()
    return {name: round(seconds * 1e6, 3) for name, seconds in figures.items()}


def _timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def _keys(salt: int) -> tuple[bytes, ...]:
    root = root_key(model="m", dtype="bfloat16", layout="l", block_tokens=1, salt=str(salt))
    return tuple(block_keys(root, range(NUM_BLOCKS), 1))


def main() -> None:
    print(json.dumps({"unit": "us, per block where not said otherwise", "blocks": NUM_BLOCKS, **measure()}, indent=2))


if __name__ == "__main__":
    main()
