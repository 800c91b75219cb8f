"""What lies where on the SSD: two files of one directory, the places of the blocks and the table that says what is in them.

    kvasir-ssd.data    | superblock … | place 0 | place 1 | …          direct I/O, places of whole pages
                       0              1 MiB
    kvasir-ssd.table   | superblock | record 0 | record 1 | …          64 bytes a record, through the page cache
                       0            4096

A record names the block in a place and holds the checksum of its bytes, so a place needs no header of its own: blocks are read
and written as they lie in the arena, and the table of 100,000 places is read at a start in one go (6 MiB). A record proves
itself by a checksum over the file's id and the number of its place; the bytes of a place are proven by its record.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from kvasir.core.keys import KEY_BYTES, BlockKey
from kvasir.store.arena import PAGE_BYTES
from kvasir.store.ssd.buffers import Bytes

MAGIC = b"KVASIRSD"
VERSION = 1
DATA_NAME = "kvasir-ssd.data"
TABLE_NAME = "kvasir-ssd.table"
DATA_START = 1 << 20
"""Places start on a border that stripes and flash pages share."""

RECORD_BYTES = 64
FILE_ID_BYTES = 16
MAX_IDENTITY_BYTES = 2048

_SUPERBLOCK = struct.Struct("<8sI16sQI")  # magic, version, file id, slot bytes, length of the identity, which follows
_CHECK = struct.Struct("<Q")
_BODY = struct.Struct("<16sQ16sI12x")  # key, sequence, checksum of the data, depth
_RECORD = struct.Struct(_BODY.format + "Q")
_PLACE = struct.Struct("<Q")
_PLACED = struct.Struct("<16sQ" + _BODY.format[1:])  # file id and place before the body: what its check covers
EMPTY_RECORD = bytes(RECORD_BYTES)


@dataclass(frozen=True, slots=True)
class Superblock:
    """First page of both files. `identity` says in words what makes blocks of different files different."""

    file_id: bytes
    slot_bytes: int
    identity: str
    version: int = VERSION

    def packed(self) -> bytes:
        """One page."""
        name = self.identity.encode()
        body = _SUPERBLOCK.pack(MAGIC, self.version, self.file_id, self.slot_bytes, len(name)) + name
        body = body.ljust(PAGE_BYTES - _CHECK.size, b"\0")
        return body + _CHECK.pack(xxh3_64_intdigest(body))


class Record(NamedTuple):
    """What is in a place. `sequence` starts at 1 and grows with each write to the file."""

    key: BlockKey
    sequence: int
    data_check: bytes
    depth: int

    def packed(self, file_id: bytes, place: int) -> bytes:
        """RECORD_BYTES bytes that are valid in this place of this file only."""
        placed = _PLACED.pack(file_id, place, self.key, self.sequence, self.data_check, self.depth)
        return placed[-_BODY.size :] + _CHECK.pack(xxh3_64_intdigest(placed))


def read_superblock(page: bytes) -> Superblock | None:
    """None when these bytes are not a whole superblock of any version."""
    if len(page) < PAGE_BYTES or not page.startswith(MAGIC):
        return None
    _, version, file_id, slot_bytes, length = _SUPERBLOCK.unpack_from(page)
    (check,) = _CHECK.unpack_from(page, PAGE_BYTES - _CHECK.size)
    if check != xxh3_64_intdigest(page[: PAGE_BYTES - _CHECK.size]) or length > MAX_IDENTITY_BYTES:
        return None
    name = page[_SUPERBLOCK.size : _SUPERBLOCK.size + length]
    return Superblock(file_id, slot_bytes, name.decode(errors="replace"), version)


def read_records(raw: bytes, file_id: bytes, first_place: int) -> list[Record | None]:
    """The records of neighbouring places; None where one is empty, torn or damaged."""
    records: list[Record | None] = []
    for number, (key, sequence, data_check, depth, check) in enumerate(_RECORD.iter_unpack(raw)):
        start = number * RECORD_BYTES
        placed = file_id + _PLACE.pack(first_place + number) + raw[start : start + _BODY.size]
        is_valid = sequence and check == xxh3_64_intdigest(placed)
        records.append(Record(key, sequence, data_check, depth) if is_valid else None)
    return records


def data_check_of(data: Bytes) -> bytes:
    """16 bytes; large buffers are hashed without the interpreter's lock."""
    return xxh3_128_digest(data.data)


def place_bytes(slot_bytes: int) -> int:
    """A block's bytes in whole pages."""
    return -(-slot_bytes // PAGE_BYTES) * PAGE_BYTES


def place_offset(place: int, slot_bytes: int) -> int:
    """Where a place starts in the data file."""
    return DATA_START + place * place_bytes(slot_bytes)


def record_offset(place: int) -> int:
    """Where a record starts in the table."""
    return PAGE_BYTES + place * RECORD_BYTES


def data_file_bytes(num_slots: int, slot_bytes: int) -> int:
    return place_offset(num_slots, slot_bytes)


def table_file_bytes(num_slots: int) -> int:
    return record_offset(num_slots)


def places_that_fit(ssd_bytes: int, slot_bytes: int) -> int:
    """How many places two files of together at most `ssd_bytes` have."""
    return max(0, ssd_bytes - DATA_START - PAGE_BYTES) // (place_bytes(slot_bytes) + RECORD_BYTES)


assert _BODY.size + _CHECK.size == _RECORD.size == RECORD_BYTES
assert KEY_BYTES == FILE_ID_BYTES == 16
