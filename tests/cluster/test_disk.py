"""How much the brain may have written to the SSD at a time."""

import pytest

from kvasir.cluster.disk import SPILLING_BYTES, max_spilling
from kvasir.pool.node import MAX_SPILLING
from kvasir.store.ssd import SsdQueues


@pytest.mark.parametrize("slot_bytes", [16 << 20, 1 << 20, SPILLING_BYTES])
def test_large_blocks_are_written_by_number(slot_bytes: int) -> None:
    assert max_spilling(slot_bytes) == MAX_SPILLING


def test_small_blocks_are_written_by_bytes() -> None:
    assert max_spilling(64 << 10) == SPILLING_BYTES // (64 << 10) == 128


@pytest.mark.parametrize("slot_bytes", [1, 4096])
def test_the_workers_never_drop_what_the_brain_has_written(slot_bytes: int) -> None:
    assert max_spilling(slot_bytes) == SsdQueues().max_writes
