"""What is said between a RemotePool and a PoolServer: frames of a length (4 bytes, little-endian) and one msgpack message.

    client                         server
                            ◀──    Welcome
    a Request               ──▶
                            ◀──    its answer: Allocated, Matched, Block, Found, Done, or Failed

One request at a time. A connection belongs to one incarnation of the pool, so that no request needs to name it, and what was
allocated over it lives no longer than it does. Only blocks of Get and Put travel here; transfers go past it.
"""

from __future__ import annotations

from struct import Struct as Layout
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from kvasir.core.address import host_and_port
from kvasir.core.errors import ConfigError, PoolError
from kvasir.core.keys import BlockKey
from kvasir.core.tier import Tier
from kvasir.store.messenger import PeerArena

VERSION = 2
LENGTH = Layout("<I")
MAX_MESSAGE_BYTES = 16 << 20
"""Beyond the block in it. Names of 600 000 blocks take so much; what says that it is longer is garbage."""

MAX_WAIT_MS = 3_600_000


class Message(Struct, frozen=True, tag=True):
    """Anything that is said."""


class Welcome(Message, frozen=True):
    """The server's first word."""

    version: int
    block_bytes: int


class Alloc(Message, frozen=True):
    """Answered by Allocated: addresses that belong to the connection until they are inserted or freed, or it ends."""

    num_blocks: Annotated[int, Meta(ge=0)]


class Allocated(Message, frozen=True):
    addresses: tuple[int, ...]


class Free(Message, frozen=True):
    """Answered by Done."""

    addresses: tuple[int, ...]


class Receive(Message, frozen=True):
    """Pull blocks from the giver's `source` into allocated `target`; answered by Done once nothing more is read there.

    The blocks are what they were if the giver kept them until the answer.
    """

    giver: PeerArena
    source: tuple[int, ...]
    target: tuple[int, ...]
    within_ms: Annotated[int, Meta(ge=1, le=MAX_WAIT_MS)]


class Insert(Message, frozen=True):
    """Publish blocks that were received completely; answered by Done."""

    keys: tuple[BlockKey, ...]
    addresses: tuple[int, ...]


class Match(Message, frozen=True):
    """Answered by Matched: the longest prefix of `keys` that can be read, from DRAM or SSD. Nothing keeps it there."""

    keys: tuple[BlockKey, ...]


class Matched(Message, frozen=True):
    num_blocks: int


class Delete(Message, frozen=True):
    """Forget blocks, except leased ones; answered by Done."""

    keys: tuple[BlockKey, ...]


class Put(Message, frozen=True):
    """Answered by Done when the block can be read."""

    key: BlockKey
    value: bytes


class Get(Message, frozen=True):
    """Answered by Block."""

    key: BlockKey


class Block(Message, frozen=True):
    value: bytes


class Exists(Message, frozen=True):
    """Answered by Found."""

    key: BlockKey


class Found(Message, frozen=True):
    tier: Tier | None


class Done(Message, frozen=True):
    pass


class Failed(Message, frozen=True):
    """Why a request, or the connection, was refused; nothing came of it."""

    message: str


Request = Alloc | Free | Receive | Insert | Match | Delete | Put | Get | Exists
Answer = Welcome | Allocated | Matched | Block | Found | Done | Failed

REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_ENCODER = msgspec.msgpack.Encoder()

T = TypeVar("T")


def pack(message: Message) -> bytes:
    """The whole frame."""
    payload = _ENCODER.encode(message)
    return LENGTH.pack(len(payload)) + payload


def length_of(header: bytes | bytearray, at_most: int = MAX_MESSAGE_BYTES) -> int:
    """Bytes that follow the first LENGTH.size. Raises PoolError."""
    (length,) = LENGTH.unpack(header)
    if length > at_most:
        raise PoolError(f"said a message of {length} bytes, expected at most {at_most}; do both run the same version?")
    return int(length)


def unpack(decoder: msgspec.msgpack.Decoder[T], payload: bytes | bytearray) -> T:
    """Raises PoolError."""
    try:
        return decoder.decode(payload)
    except (ValueError, RecursionError) as error:
        raise PoolError(f"said what is no message: {error}; do both run the same version?") from error


def split_address(address: str) -> tuple[str, int]:
    """HOST, PORT. Raises ConfigError."""
    found = host_and_port(address)
    if found is None:
        raise ConfigError(f"expected HOST:PORT, got {address!r}")
    return found
