"""A process that writes without end and is killed: what the next one finds reads back right, or is dropped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

from kvasir.store.ssd import SsdOutcome
from kvasir.store.ssd.buffers import aligned
from tests.store.ssd.blocks import block_of, opened

NUM_SLOTS = 32
SLOT_BYTES = 1 << 18
KILLS = 4

WRITER = r"""
import os, sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from random import Random
from kvasir.store.ssd import SsdOutcome
from tests.store.ssd.blocks import block_of, opened
from tests.store.ssd.test_crash import NUM_SLOTS, SLOT_BYTES, key_of_block

directory, seed = Path(sys.argv[1]), int(sys.argv[2])
ssd = opened(directory, num_slots=NUM_SLOTS, slot_bytes=SLOT_BYTES)
blocks = [block_of(number, SLOT_BYTES) for number in range(8)]

def write_for_ever(lane):
    rng = Random(seed * 100 + lane)
    for turn in count():
        place = rng.randrange(NUM_SLOTS // 4) * 4 + lane  # a place has one writer at a time
        number = rng.randrange(len(blocks))
        assert ssd.write(place, key_of_block(number, place), turn, blocks[number]) is SsdOutcome.OK
        os.write(1, b"%d %d\n" % (place, number))  # at once and whole, between threads

with ThreadPoolExecutor(4) as pool:
    list(pool.map(write_for_ever, range(4)))
"""


def key_of_block(number: int, place: int) -> bytes:
    """Says what the bytes must be; of one place only, so that no copy hides another."""
    return number.to_bytes(8, "big") + place.to_bytes(8, "big")


@pytest.mark.timeout(120)
def test_after_a_kill_all_that_is_found_is_right_and_all_that_was_reported_is_there(tmp_path: Path) -> None:
    rng = Random(4)
    blocks = [block_of(number, SLOT_BYTES) for number in range(8)]
    for seed in range(KILLS):
        last = _write_until_killed(tmp_path, seed, reports=rng.randrange(40, 120))
        with opened(tmp_path, num_slots=NUM_SLOTS, slot_bytes=SLOT_BYTES) as ssd:
            found = {block.ssd_slot: block for block in ssd.recover()}
            torn = 0
            for place, block in found.items():
                into = aligned(SLOT_BYTES)
                outcome = ssd.read(place, block.key, into)
                torn += outcome is SsdOutcome.CORRUPT
                if outcome is SsdOutcome.OK:
                    assert np.array_equal(into, blocks[int.from_bytes(block.key[:8], "big")])
            assert torn <= 4, "only the older blocks that 4 threads were just overwriting"
            changed = [p for p, number in last.items() if p not in found or found[p].key != key_of_block(number, p)]
            assert len(changed) <= 4, f"only what 4 threads were about to overwrite may differ from the reports: {changed}"


def _write_until_killed(directory: Path, seed: int, reports: int) -> dict[int, int]:
    """What the writer had reported, by place."""
    last: dict[int, int] = {}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory), str(seed)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            words = line.split()
            if len(words) != 2 or not all(word.isdigit() for word in words):
                continue  # the log
            last[int(words[0])] = int(words[1])
            reports -= 1
            if not reports:
                writer.kill()
        assert writer.wait(timeout=20) == -9
    return last
