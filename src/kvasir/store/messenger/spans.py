"""Which bytes move where: spans of slots, checked against both arenas, cut into slices, and turned into views of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from kvasir.core.errors import TransferError
from kvasir.store.arena import Arena, ArenaHandle


class SpanPair(NamedTuple):
    """`length` bytes from `offset` on, in a slot here and a slot there. One layer of one block, or a whole block.

    A tuple, because a long prompt has tens of thousands of them.
    """

    remote_slot: int
    local_slot: int
    offset: int
    length: int


class Slice(NamedTuple):
    """Consecutive pieces of spans that travel as one message; with it, the first `whole` spans are complete."""

    number: int
    pieces: tuple[SpanPair, ...]
    nbytes: int
    whole: int


def check_spans(spans: Sequence[SpanPair], remote: ArenaHandle, local: ArenaHandle) -> None:
    """Raises TransferError (out_of_range), naming the first span that lies outside of a slot of either arena."""
    num_remote, num_local, slot_bytes = remote.num_slots, local.num_slots, min(remote.slot_bytes, local.slot_bytes)
    for span in spans:
        remote_slot, local_slot, offset, length = span
        is_inside = 0 <= remote_slot < num_remote and 0 <= local_slot < num_local
        if not is_inside or offset < 0 or length <= 0 or offset + length > slot_bytes:
            sizes = f"{num_remote} slots there, {num_local} here, {slot_bytes} bytes each"
            raise TransferError(f"{span} lies outside of the arenas ({sizes})", cause="out_of_range")


def cut(spans: Sequence[SpanPair], *, max_bytes: int, max_pieces: int) -> Iterator[Slice]:
    """Slices in the order of the spans, each at most so large; a longer span is cut into pieces."""
    number, pieces, room = 0, list[SpanPair](), max_bytes
    for index, (remote_slot, local_slot, offset, length) in enumerate(spans):
        at, end = offset, offset + length
        while at < end:
            step = min(end - at, room)
            pieces.append(SpanPair(remote_slot, local_slot, at, step))
            at, room = at + step, room - step
            if not room or len(pieces) == max_pieces:
                yield Slice(number, tuple(pieces), max_bytes - room, index + (at == end))
                number, pieces, room = number + 1, [], max_bytes
    if pieces:
        yield Slice(number, tuple(pieces), max_bytes - room, len(spans))


class ArenaViews:
    """Views of an arena's memory for scattered sends and receives; they are made anew for each use and copy nothing."""

    def __init__(self, arena: Arena):
        self._memory = memoryview(arena.memory.data).cast("B")
        self._stride = arena.stride

    def local(self, pieces: Iterable[SpanPair]) -> list[memoryview]:
        return self.at([(slot, offset, length) for _, slot, offset, length in pieces])

    def at(self, places: Iterable[tuple[int, int, int]]) -> list[memoryview]:
        """Views of (slot, offset, length), in order; neighbours that touch become one."""
        ranges: list[tuple[int, int]] = []
        for slot, offset, length in places:
            start = slot * self._stride + offset
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], start + length)
            else:
                ranges.append((start, start + length))
        return [self._memory[start:end] for start, end in ranges]
