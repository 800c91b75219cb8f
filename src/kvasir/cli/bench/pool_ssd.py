"""What the SSD tier reaches of what the disk gives: blocks through SsdWorkers against plain direct I/O and fio, in turns."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import uvloop

from kvasir.cluster.disk import max_spilling
from kvasir.core.errors import ConfigError
from kvasir.store.arena import Arena, create_arena
from kvasir.store.ssd import SsdFile, SsdOutcome, SsdQueues, SsdRead, SsdWorkers, SsdWrite, open_ssd

Direction = Literal["write", "read"]

BLOCK_BYTES = (64 << 10, 1 << 20, 16 << 20)
FILE_BYTES = 1 << 30
"""Written and read by each in a turn; there are two such files. Less, and a turn of large blocks is start and end only."""

MAX_BLOCKS = 4096
"""With blocks of 64 KiB a turn is shorter: 256 MiB."""

WAITING = 4
"""Blocks under way or waiting, in depths, but of small ones as many as the pool's brain lets be written at a time."""

FIO_S = 120.0


@dataclass(frozen=True, slots=True)
class SsdFigure:
    """Bytes a second of each turn, for one block size and direction; `fio` is empty where it is not installed."""

    block_bytes: int
    direction: Direction
    depth: int
    ours: tuple[float, ...]
    direct: tuple[float, ...]
    fio: tuple[float, ...]

    @property
    def over_direct(self) -> float:
        """Median of the turns' ratios."""
        return statistics.median(a / b for a, b in zip(self.ours, self.direct, strict=True))

    @property
    def over_fio(self) -> float | None:
        return statistics.median(a / b for a, b in zip(self.ours, self.fio, strict=True)) if self.fio else None

    def to_json(self) -> dict[str, object]:
        return {
            "block_bytes": self.block_bytes,
            "depth": self.depth,
            f"ssd_{self.direction}_over_direct": round(self.over_direct, 3),
            f"ssd_{self.direction}_over_fio": round(self.over_fio, 3) if self.over_fio is not None else None,
            "gb_per_s": {
                name: [round(rate / 1e9, 3) for rate in (statistics.median(rates), min(rates), max(rates))]
                for name, rates in (("ours", self.ours), ("direct", self.direct), ("fio", self.fio))
                if rates
            },
        }


def measure_ssd(
    directory: Path,
    *,
    block_bytes: Sequence[int] = BLOCK_BYTES,
    depth: int = 8,
    file_bytes: int = FILE_BYTES,
    turns: int = 5,
) -> list[SsdFigure]:
    """A write and a read figure for each block size, after a turn to warm up. Borrows 2 x `file_bytes` of the disk.

    Raises ConfigError where the directory's file system has no direct I/O: then there is nothing to compare with.
    """
    return [figure for size in block_bytes for figure in _measure_size(directory, size, depth, file_bytes, turns)]


def _measure_size(directory: Path, block_bytes: int, depth: int, file_bytes: int, turns: int) -> list[SsdFigure]:
    num_blocks = max(depth, min(MAX_BLOCKS, file_bytes // block_bytes))
    rates: dict[tuple[str, Direction], list[float]] = {}
    directions: tuple[Direction, ...] = ("write", "read")
    with _bed(directory, block_bytes, num_blocks, depth) as bed:
        for turn in range(turns + 1):
            for direction in directions:
                for name, measure in bed.contestants(turn).items():
                    rate = measure(direction)
                    if turn:
                        rates.setdefault((name, direction), []).append(rate)
    return [
        SsdFigure(block_bytes, d, depth, *(tuple(rates.get((name, d), ())) for name in ("ours", "direct", "fio")))
        for d in directions
    ]


@dataclass(frozen=True, slots=True)
class _Bed:
    """The same blocks of one arena and the same disk for all."""

    ssd: SsdFile
    arena: Arena
    plain: Path
    num_blocks: int
    depth: int

    def contestants(self, turn: int) -> dict[str, Callable[[Direction], float]]:
        """Each time another begins: a disk remembers what was done to it."""
        all_of_them: list[tuple[str, Callable[[Direction], float]]] = [("ours", self.ours), ("direct", self.direct)]
        if shutil.which("fio") is not None:
            all_of_them.append(("fio", self.fio))
        first = turn % len(all_of_them)
        return dict(all_of_them[first:] + all_of_them[:first])

    def ours(self, direction: Direction) -> float:
        """Bytes a second through the workers."""
        return uvloop.run(_through_workers(self, direction))  # as the pool's process does

    def direct(self, direction: Direction) -> float:
        """Bytes a second of `depth` threads that do nothing else."""
        fd = os.open(self.plain, os.O_RDWR | os.O_DIRECT)
        try:
            return self._timed(lambda: _plain_threads(self, fd, os.pwritev if direction == "write" else os.preadv))
        finally:
            os.close(fd)

    def fio(self, direction: Direction) -> float:
        """Bytes a second that fio reports for the same file, size and depth."""
        size = self.arena.handle.slot_bytes
        what = [f"--filename={self.plain}", f"--rw={direction}", f"--bs={size}", f"--size={size * self.num_blocks}"]
        how = ["--direct=1", "--ioengine=libaio", f"--iodepth={self.depth}", "--overwrite=1", "--fallocate=none"]
        command = ["fio", "--name=block", *what, *how, "--output-format=json"]
        out = subprocess.run(command, capture_output=True, check=True, timeout=FIO_S).stdout
        return float(json.loads(out)["jobs"][0][direction]["bw_bytes"])

    def _timed(self, work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return self.arena.handle.slot_bytes * self.num_blocks / (time.perf_counter() - began)


@contextmanager
def _bed(directory: Path, block_bytes: int, num_blocks: int, depth: int) -> Iterator[_Bed]:
    arena = create_arena(max(WAITING * depth, max_spilling(block_bytes)), block_bytes)
    arena.memory[:] = 0x5A
    with tempfile.TemporaryDirectory(prefix="kvasir-bench-", dir=directory) as own:
        plain = Path(own) / "plain"
        with plain.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, block_bytes * num_blocks)
        with open_ssd(own, num_slots=num_blocks, slot_bytes=block_bytes, identity="a benchmark") as ssd:
            if not ssd.is_direct:
                raise ConfigError(f"{directory} has no direct I/O to measure; name a directory on a disk")
            yield _Bed(ssd, arena, plain, num_blocks, depth)
    arena.close()


async def _through_workers(bed: _Bed, direction: Direction) -> float:
    """A window of blocks over the file; an arena's slot is used again when its block has arrived."""
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    places = iter(range(bed.num_blocks))
    left = bed.num_blocks

    def next_block(slot: int) -> None:
        if (place := next(places, None)) is None:
            return
        key, memory = place.to_bytes(16, "big"), bed.arena.slot(slot)
        if direction == "write":
            workers.submit_write(SsdWrite(place, key, 0, memory), lambda outcome: arrived(slot, [outcome]))
        else:
            workers.submit_reads([SsdRead(place, key, memory)], lambda outcomes: arrived(slot, outcomes))

    def arrived(slot: int, outcomes: list[SsdOutcome]) -> None:
        nonlocal left
        if finished.done():
            return
        if outcomes != [SsdOutcome.OK]:
            finished.set_exception(ConfigError(f"{direction} of a block ended as {outcomes}; is the disk healthy?"))
            return
        left -= 1
        if not left:
            finished.set_result(None)
        next_block(slot)

    async with SsdWorkers(bed.ssd, SsdQueues(depth=bed.depth)) as workers:
        began = time.perf_counter()
        for slot in range(bed.arena.num_slots):
            next_block(slot)
        async with asyncio.timeout(FIO_S):
            await finished
        return bed.arena.handle.slot_bytes * bed.num_blocks / (time.perf_counter() - began)


def _plain_threads(bed: _Bed, fd: int, move: Callable[[int, list[memoryview], int], int]) -> None:
    places = iter(range(bed.num_blocks))
    lock = threading.Lock()

    def run(slot: int) -> None:
        memory = bed.arena.slot(slot)
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                return
            if move(fd, [memory.data], place * memory.nbytes) != memory.nbytes:
                raise OSError(f"block {place} was moved in part only")

    threads = [threading.Thread(target=run, args=(slot,)) for slot in range(bed.depth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
