"""vLLM's KV events as bytes: msgpack batches of BlockStored, BlockRemoved and AllBlocksCleared.

A message on the wire is (topic, sequence number as 8 bytes big-endian, payload); this file is about the payload. A batch is the
array `[ts, events, data_parallel_rank]`. Events have had two shapes in vLLM's `distributed/kv_events.py`: first arrays of a
tag and the fields in order, later (0.26 for one) maps with the tag under `type`. Block hashes are integers of 64 bits, the
low end of the hash (vLLM's default), or the whole hash as bytes. All of it is understood; what is written can be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec
from msgspec import Struct
from msgspec.structs import astuple

from kvasir.core.errors import KvasirError
from kvasir.core.tier import Tier

BlockHash = int | bytes

MEDIUMS = {Tier.DRAM: "CPU", Tier.SSD: "STORAGE"}
"""vLLM's names of the places where a block can lie; its third is GPU."""

ON_DISK = frozenset({"STORAGE", "DISK", "NVME", "CPU_TIER2"})
"""Names for the SSD tier among those who speak the format; every other medium is memory."""

MAX_RANKS = 4096
"""More nodes than any cluster has: a rank beyond is garbage."""

_LOW_64_BITS = (1 << 64) - 1


class _KvEvent(Struct, frozen=True, tag=True, omit_defaults=True):
    """The order of the fields is the order on the wire."""


class BlockStored(_KvEvent, frozen=True):
    """These blocks, each the parent of the next, can be read in `medium` now. `token_ids` are those of all of them, or empty.

    `extra_keys` has an entry for each block: None, or what beside the tokens its KV depends on.
    """

    block_hashes: Sequence[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[list[Any] | None] | None = None


class BlockRemoved(_KvEvent, frozen=True):
    """These blocks are gone from `medium`."""

    block_hashes: Sequence[BlockHash]
    medium: str | None


class AllBlocksCleared(_KvEvent, frozen=True):
    """All blocks of the batch's rank are gone."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared

_FIELDS: dict[str, tuple[str, ...]] = {kind.__name__: kind.__struct_fields__ for kind in (BlockStored, BlockRemoved)} | {
    AllBlocksCleared.__name__: ()
}
_LATER_FIELDS: dict[str, Any] = {"lora_id": None, "medium": None, "lora_name": None}
"""Required by newer versions, not sent by older ones."""


class Malformed(KvasirError):
    """Bytes that are no batch of KV events."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What happened on one rank (of ours: one node) at `ts`, in seconds since 1970.

    `skipped` counts events that were not understood.
    """

    ts: float
    events: tuple[KvEvent, ...]
    rank: int
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class WireFormat:
    """How events are written: `array` or `map`, with hashes as `int` or `bytes`."""

    shape: Literal["array", "map"] = "array"
    hashes: Literal["int", "bytes"] = "int"

    def hash_of(self, key: bytes) -> BlockHash:
        """A block key as it is written."""
        return key if self.hashes == "bytes" else int.from_bytes(key[-8:], "big")


def encode(batch: Batch, shape: Literal["array", "map"]) -> bytes:
    """The payload of a message."""
    events: list[Any] = list(batch.events)
    if shape == "array":
        events = [[type(event).__name__, *astuple(event)] for event in batch.events]
    return msgspec.msgpack.encode([batch.ts, events, batch.rank])


class _RawBatch(Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _RawMapBatch(Struct):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


_ARRAY_BATCH = msgspec.msgpack.Decoder(_RawBatch)
_MAP_BATCH = msgspec.msgpack.Decoder(_RawMapBatch)


def decode(payload: bytes) -> Batch:
    """Any version's batch. Raises Malformed; single events that are not understood are skipped and counted."""
    try:
        raw = (_MAP_BATCH if _is_map(payload) else _ARRAY_BATCH).decode(payload)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not a batch of KV events: {error}") from None
    rank = raw.data_parallel_rank or 0
    if not 0 <= rank < MAX_RANKS:
        raise Malformed(f"a data_parallel_rank is 0 to {MAX_RANKS - 1}, got {rank}")
    events = [_decode_event(bytes(event)) for event in raw.events]
    known = tuple(event for event in events if event is not None)
    return Batch(raw.ts, known, rank, skipped=len(events) - len(known))


def hash_bytes(block_hash: BlockHash) -> bytes:
    """A hash as bytes: a number as 8 of them, big-endian, whichever sign its writer gave it."""
    return block_hash if isinstance(block_hash, bytes) else (block_hash & _LOW_64_BITS).to_bytes(8, "big")


def tier_of(medium: str | None) -> Tier:
    """The tier that an event is about."""
    return Tier.SSD if medium is not None and medium.upper() in ON_DISK else Tier.DRAM


def _decode_event(raw: bytes) -> KvEvent | None:
    try:
        value = msgspec.msgpack.decode(raw)
        fields = value if isinstance(value, dict) else _named(value)
        return cast(KvEvent, msgspec.convert(_LATER_FIELDS | fields, KvEvent))  # a union is no type to mypy here
    except (ValueError, TypeError, RecursionError):
        return None


def _named(value: Any) -> dict[str, Any]:
    """The fields of an event that is an array. Raises TypeError or ValueError for what is none."""
    tag, *values = value
    names = _FIELDS.get(tag) if isinstance(tag, str) else None
    if names is None:
        raise ValueError("an unknown event")
    return {"type": tag, **dict(zip(names, values, strict=False))}


def _is_map(payload: bytes) -> bool:
    first = payload[0] if payload else 0
    return 0x80 <= first <= 0x8F or first in (0xDE, 0xDF)
