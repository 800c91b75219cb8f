"""Measures the pool in one process: put and get over a plain copy, and the conductor's index of blocks."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvasir.cli.bench.sizes import MIB, SIZES
from kvasir.pool.directory import BlockDirectory
from kvasir.store.mempool import MemPool

NODES = 64
BLOCKS = 1_000_000
PROMPT_BLOCKS = 2_048
"""A prompt of 128k tokens in blocks of 64."""
EVENT_BLOCKS = 32
"""Blocks in one event of a node: about what a chunk of a prefill publishes."""


@dataclass(frozen=True, slots=True)
class PoolSpeed:
    """GB/s of each round, for blocks of one size."""

    block_bytes: int
    memcpy: tuple[float, ...]
    put: tuple[float, ...]
    get: tuple[float, ...]

    def over_memcpy(self, rounds: tuple[float, ...]) -> float:
        """Median of the rounds' ratios."""
        return round(statistics.median(a / b for a, b in zip(rounds, self.memcpy, strict=True)), 3)


def measure_pool(*, working_set: int = 256 * MIB, rounds: int = 5, sizes: tuple[int, ...] = SIZES) -> list[PoolSpeed]:
    """Single puts and gets of a MemPool, and copies of the same bytes between two buffers, in turn; the first round warms up.

    Puts go into a pool that is full, so that each evicts a block, as in service.
    """
    return [_measure_size(size, working_set, rounds + 1) for size in sizes]


def _measure_size(size: int, working_set: int, rounds: int) -> PoolSpeed:
    count = working_set // size
    source = np.ones((count, size), np.uint8)
    target = np.zeros((count, size), np.uint8)
    memcpy, put, get = [], [], []
    with MemPool(num_blocks=count, block_bytes=size) as pool:
        for turn in range(rounds):
            keys = [(turn * count + i).to_bytes(16, "big") for i in range(count)]
            memcpy.append(_rate(working_set, partial(_each, np.copyto, target, source)))
            put.append(_rate(working_set, partial(_each, pool.put, keys, source)))
            get.append(_rate(working_set, partial(_each, pool.get, keys, target)))
    return PoolSpeed(size, tuple(memcpy[1:]), tuple(put[1:]), tuple(get[1:]))


def _each(call: Callable[[Any, Any], object], first: Iterable[Any], second: Iterable[Any]) -> None:
    for one, other in zip(first, second, strict=True):
        call(one, other)


def _rate(num_bytes: int, work: Callable[[], None]) -> float:
    return num_bytes / _seconds(work) / 1e9


@dataclass(frozen=True, slots=True)
class DirectoryCost:
    """Microseconds of matching a prompt of 2,048 blocks, and of inserting and removing one block; bytes for each entry."""

    match_us: float
    insert_us: float
    remove_us: float
    bytes_per_entry: float


def measure_directory(*, blocks: int = BLOCKS) -> DirectoryCost:
    """In a process of its own, whose memory it is: `blocks` on 64 nodes, keys included."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(_measure_directory, (blocks,))


def _measure_directory(blocks: int) -> DirectoryCost:
    directory = BlockDirectory()
    names = [f"node{i:02}" for i in range(NODES)]
    sequence = dict.fromkeys(names, 0)
    before = _resident_bytes()
    insert_s = 0.0
    for start in range(0, blocks, EVENT_BLOCKS):
        node = names[start // EVENT_BLOCKS % NODES]
        keys = [os.urandom(16) for _ in range(min(EVENT_BLOCKS, blocks - start))]
        sequence[node] += 1
        started = time.perf_counter()
        directory.stored(node, sequence[node], keys)
        insert_s += time.perf_counter() - started
    entry_bytes = (_resident_bytes() - before) / blocks
    prompt = tuple(os.urandom(16) for _ in range(PROMPT_BLOCKS))
    for i, node in enumerate(names):  # nodes have prefixes of different lengths, so that the match has to look at each
        sequence[node] += 1
        directory.stored(node, sequence[node], prompt[: PROMPT_BLOCKS * (i + 1) // NODES])
    match_s = statistics.median(_seconds(lambda: directory.match(prompt)) for _ in range(200))
    remove_s = 0.0
    for node in names:
        sequence[node] += 1
        remove_s += _seconds(partial(directory.removed, node, sequence[node], prompt))
    return DirectoryCost(
        round(match_s * 1e6, 1),
        round(insert_s / blocks * 1e6, 3),
        round(remove_s / (NODES * PROMPT_BLOCKS) * 1e6, 3),
        round(entry_bytes, 1),
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
