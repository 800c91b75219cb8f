"""Blocks for tests: bytes that tell which block they are of."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np

from kvasir.store.ssd import SsdFile, open_ssd
from kvasir.store.ssd.buffers import Bytes, aligned
from kvasir.store.ssd.file_ops import FileOps

IDENTITY = "tiny, bfloat16, blocks of 64 tokens"
SLOT_BYTES = 3 * 4096


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def block_of(number: int, slot_bytes: int = SLOT_BYTES) -> Bytes:
    """On a page, as in an arena."""
    block = aligned(slot_bytes)
    block[:] = np.frombuffer(Random(number).randbytes(slot_bytes), dtype=np.uint8)
    return block


def opened(
    directory: Path,
    *,
    num_slots: int = 8,
    slot_bytes: int = SLOT_BYTES,
    identity: str = IDENTITY,
    replace_other: bool = False,
    ops: FileOps | None = None,
    try_direct: bool = True,
) -> SsdFile:
    return open_ssd(
        directory,
        num_slots=num_slots,
        slot_bytes=slot_bytes,
        identity=identity,
        replace_other=replace_other,
        ops=ops,
        try_direct=try_direct,
    )
