"""What is said over a transfer connection, byte by byte. All numbers are little-endian.

    client                                                    server
    Hello: magic, version, id of the arena          ──▶
                                                    ◀──       Welcome: magic, version, code, id, sizes of the arena
    Request GET: number, pieces                     ──▶
                                                    ◀──       Answer: number, code 0, length, then the bytes
    Request PUT: number, pieces, ticket, then bytes ──▶
                                                    ◀──       Answer: number, code 0, length 0

Answers come in the order of the requests. Any code but 0 is the server's last word before it closes the connection. A
connection belongs to one incarnation of an arena, so that no request needs to name it again.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from kvasir.core.errors import TransferCause, TransferError
from kvasir.store.arena import ArenaHandle
from kvasir.store.messenger.spans import SpanPair

VERSION = 1
MAX_PIECES = 512
"""Pieces of a request: with the header, one system call takes them (IOV_MAX is 1024)."""

MAX_REQUEST_BYTES = 16 << 20
ID_BYTES = 16
NO_TICKET = bytes(ID_BYTES)

HELLO = struct.Struct("<8sI4x16s")
WELCOME = struct.Struct("<8sIH2x16sQQQ")
REQUEST = struct.Struct("<4sBxHIxxxxQ16s")  # magic, op, pieces, number, bytes, ticket
ANSWER = struct.Struct("<4sHxxI4xQ")  # magic, code, number, bytes
PLACE = struct.Struct("<QQQ")  # slot, offset, length

_HELLO_MAGIC = b"KVASIRTX"
_REQUEST_MAGIC = b"KVRQ"
_ANSWER_MAGIC = b"KVAN"


class Op(IntEnum):
    GET = 1
    PUT = 2


_OPS = frozenset(int(op) for op in Op)


class Code(IntEnum):
    """Why a server refuses."""

    OK = 0
    GARBLED = 1
    STALE_ARENA = 2
    OUT_OF_RANGE = 3
    BUSY = 4
    NOT_GRANTED = 5


_CAUSES: dict[Code, tuple[TransferCause, str]] = {
    Code.GARBLED: ("garbled", "did not understand us; do both run the same version?"),
    Code.STALE_ARENA: ("stale_arena", "has another arena by now; was the pool restarted?"),
    Code.OUT_OF_RANGE: ("out_of_range", "has no such slot or byte"),
    Code.BUSY: ("refused", "has as many connections as it takes; raise its max_connections"),
    Code.NOT_GRANTED: ("refused", "did not grant these slots, or the grant was revoked"),
}


class Request(NamedTuple):
    op: int
    num_pieces: int
    number: int
    nbytes: int
    ticket: bytes


class Garbled(Exception):
    """Bytes that no peer of this version says."""


def refusal(code: int, peer: str) -> TransferError:
    """The error that a server's code means to its client."""
    known = code in list(Code) and code != Code.OK
    cause, text = _CAUSES[Code(code)] if known else ("garbled", f"answered with an unknown code {code}")
    return TransferError(f"{peer} {text}", cause=cause)


def pack_hello(arena_id: bytes) -> bytes:
    return HELLO.pack(_HELLO_MAGIC, VERSION, arena_id)


def unpack_hello(raw: bytes | bytearray) -> bytes:
    """The id of the arena that is meant."""
    magic, version, arena_id = HELLO.unpack(raw)
    if magic != _HELLO_MAGIC or version != VERSION:
        raise Garbled(f"hello {bytes(magic)!r} version {version}")
    return bytes(arena_id)


def pack_welcome(code: Code, handle: ArenaHandle) -> bytes:
    return WELCOME.pack(_HELLO_MAGIC, VERSION, code, handle.id, handle.num_slots, handle.stride, handle.slot_bytes)


def check_welcome(raw: bytes | bytearray, expected: ArenaHandle, peer: str) -> None:
    """Raises TransferError unless it is a welcome to the arena that was meant."""
    magic, version, code, arena_id, num_slots, stride, slot_bytes = WELCOME.unpack(raw)
    if magic != _HELLO_MAGIC or version != VERSION:
        raise TransferError(f"{peer} speaks {bytes(magic)!r} version {version}, not version {VERSION} of ours", cause="garbled")
    if code:
        raise refusal(code, peer)
    if (arena_id, num_slots, stride, slot_bytes) != (expected.id, expected.num_slots, expected.stride, expected.slot_bytes):
        raise refusal(Code.STALE_ARENA, peer)


def pack_request(op: Op, number: int, pieces: Sequence[SpanPair], nbytes: int, ticket: bytes = NO_TICKET) -> bytes:
    places = b"".join([PLACE.pack(remote_slot, offset, length) for remote_slot, _, offset, length in pieces])
    return REQUEST.pack(_REQUEST_MAGIC, op, len(pieces), number, nbytes, ticket) + places


def unpack_request(raw: bytes | bytearray) -> Request:
    """From the first bytes of a request; places may follow."""
    magic, op, num_pieces, number, nbytes, ticket = REQUEST.unpack_from(raw)
    if magic != _REQUEST_MAGIC or op not in _OPS or not 0 < num_pieces <= MAX_PIECES or nbytes > MAX_REQUEST_BYTES:
        raise Garbled(f"request {bytes(magic)!r} op {op}, {num_pieces} pieces, {nbytes} bytes")
    return Request(op, num_pieces, number, nbytes, ticket)


def unpack_places(raw: bytes | bytearray | memoryview) -> list[tuple[int, int, int]]:
    """(slot, offset, length) of each piece."""
    return list(PLACE.iter_unpack(raw))


def pack_answer(code: Code, number: int, nbytes: int) -> bytes:
    return ANSWER.pack(_ANSWER_MAGIC, code, number, nbytes)


def check_answer(raw: bytes | bytearray, *, number: int, nbytes: int, peer: str) -> None:
    """Raises TransferError unless it is the answer to request `number`, with so many bytes."""
    magic, code, got_number, got_nbytes = ANSWER.unpack(raw)
    if magic != _ANSWER_MAGIC:
        raise TransferError(f"{peer} answered {bytes(magic)!r}", cause="garbled")
    if code:
        raise refusal(code, peer)
    if (got_number, got_nbytes) != (number, nbytes):
        got = f"request {got_number} with {got_nbytes} bytes"
        raise TransferError(f"{peer} answered {got}, expected {number} with {nbytes}", cause="garbled")
