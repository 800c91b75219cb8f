"""What is asked of the SSD, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from operator import attrgetter
from typing import NamedTuple, TypeVar

from kvasir.core.errors import PoolError
from kvasir.core.keys import KEY_BYTES, BlockKey
from kvasir.store.ssd.buffers import Bytes


class SsdOutcome(StrEnum):
    """How a read or a write ended. After a read that is not `ok`, the target holds no block, whatever bytes are in it."""

    OK = "ok"
    ABSENT = "absent"
    """Read: the place holds nothing, or another block."""
    CORRUPT = "corrupt"
    """Read: the bytes are not those that were written. The place counts as empty from now on."""
    FAILED = "failed"
    """The operating system said no. After a write the place is empty."""
    DROPPED = "dropped"
    """Not tried: the queue was full, the deadline over, or the workers closed. The place is as it was."""


class SsdWrite(NamedTuple):
    """Put `data` (slot_bytes bytes, which nobody changes until the outcome) into a place, over whatever is in it.

    A tuple, because with small blocks the processor is busier than the disk.
    """

    ssd_slot: int
    key: BlockKey
    depth: int
    data: Bytes


class SsdRead(NamedTuple):
    """Fill `into` (slot_bytes bytes, which nobody else uses until the outcome) if the place holds the block `key`."""

    ssd_slot: int
    key: BlockKey
    into: Bytes


Request = TypeVar("Request", SsdWrite, SsdRead)


def is_run(requests: Sequence[Request], max_length: int) -> bool:
    """Whether each is the next one's neighbour, as what a lane takes is: then there is nothing to sort."""
    if not 0 < len(requests) <= max_length:
        return False
    first = requests[0].ssd_slot
    return [r.ssd_slot for r in requests] == list(range(first, first + len(requests)))


def runs(requests: Sequence[Request], max_length: int) -> Iterator[list[Request]]:
    """Requests of neighbouring places, in the order of places, each run at most `max_length` long."""
    run: list[Request] = []
    for request in sorted(requests, key=attrgetter("ssd_slot")):
        if run and (request.ssd_slot != run[-1].ssd_slot + 1 or len(run) == max_length):
            yield run
            run = []
        run.append(request)
    if run:
        yield run


def require_valid(requests: Sequence[SsdWrite] | Sequence[SsdRead], *, num_slots: int, slot_bytes: int) -> None:
    """Raises PoolError, naming what is wrong with the first bad request."""
    for request in requests:
        if not 0 <= request.ssd_slot < num_slots:
            raise PoolError(f"ssd slot {request.ssd_slot} does not exist; there are {num_slots}")
        if len(request.key) != KEY_BYTES:
            raise PoolError(f"key of {len(request.key)} bytes, expected {KEY_BYTES}")
        memory = request.data if isinstance(request, SsdWrite) else request.into
        if memory.dtype.itemsize != 1 or memory.ndim != 1 or memory.nbytes != slot_bytes or not memory.flags.c_contiguous:
            raise PoolError(f"block of {memory.nbytes} bytes, {memory.ndim} dimensions: expected {slot_bytes} contiguous bytes")
        if isinstance(request, SsdWrite) and not 0 <= request.depth < 1 << 32:
            raise PoolError(f"depth {request.depth} of a block, expected 0 to 2**32 - 1")
        if isinstance(request, SsdRead) and not memory.flags.writeable:
            raise PoolError(f"the target of the read of ssd slot {request.ssd_slot} cannot be written")
    if len(requests) > 1 and len({request.ssd_slot for request in requests}) < len(requests):
        raise PoolError(f"ssd slots {sorted(request.ssd_slot for request in requests)} of one batch name a place twice")
