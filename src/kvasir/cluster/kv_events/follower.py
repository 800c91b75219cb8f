"""Keeps a directory by somebody's KV events: which of their nodes has which block. No sockets, no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvasir.cluster.kv_events.format import (
    AllBlocksCleared,
    Batch,
    BlockRemoved,
    BlockStored,
    KvEvent,
    Malformed,
    decode,
    hash_bytes,
    tier_of,
)
from kvasir.core.keys import BlockKey, block_keys
from kvasir.core.tier import Tier
from kvasir.pool.directory import BlockDirectory

MAX_BLOCKS = 4 << 20
"""Blocks kept of one rank; what a rank claims beyond that is ignored."""


@dataclass(slots=True)
class FollowerCounts:
    """Since the start. `garbage` are messages that were no batch, `skipped` events that were not understood.

    `orphans` are blocks whose key cannot be computed, `overflow` blocks beyond the bound, `resets` the times when all was
    forgotten because something was missed for good.
    """

    batches: int = 0
    events: int = 0
    garbage: int = 0
    skipped: int = 0
    orphans: int = 0
    overflow: int = 0
    duplicates: int = 0
    gaps: int = 0
    replayed: int = 0
    restarts: int = 0
    resets: int = 0


@dataclass(slots=True)
class _Held:
    """A block of theirs: its key with us, and the mediums in which it lies."""

    key: BlockKey
    mediums: set[str | None]


@dataclass(slots=True)
class _Rank:
    held: dict[bytes, _Held] = field(default_factory=dict)
    seq: int = 0


class Follower:
    """Events in, `directory.stored` and `directory.removed` out: one node of the directory for each rank.

    With a `root`, a block's key is computed from its tokens and its parent, so that prompts can be matched against what an
    engine with hashes of its own has; blocks that depend on more than tokens (a salt, an adapter, an image) are left
    out, and so are those of another size than `block_tokens`. Without one, the stream's hashes are the keys, as bytes:
    right for a Kvasir that publishes them whole.
    """

    def __init__(
        self,
        directory: BlockDirectory,
        node_of: Callable[[int], str],
        *,
        root: BlockKey | None = None,
        block_tokens: int | None = None,
        max_blocks: int = MAX_BLOCKS,
    ):
        self._directory = directory
        self._node_of = node_of
        self._root = root
        self._block_tokens = block_tokens
        self._max_blocks = max_blocks
        self._ranks: dict[int, _Rank] = {}
        self.counts = FollowerCounts()

    def take(self, payload: bytes) -> None:
        """One message's payload. Garbage is counted and dropped."""
        try:
            batch = decode(payload)
        except Malformed:
            self.counts.garbage += 1
            return
        self.counts.batches += 1
        self.counts.skipped += batch.skipped
        self._apply(batch)

    def forget(self) -> None:
        """Whatever they had, it is not known any more."""
        for number in self._ranks:
            self._directory.drop(self._node_of(number))
        self._ranks.clear()

    def num_blocks(self, rank: int = 0) -> int:
        """Blocks known of a rank."""
        return len(self._ranks[rank].held) if rank in self._ranks else 0

    def _apply(self, batch: Batch) -> None:
        for event in batch.events:
            self.counts.events += 1
            self._apply_event(batch.rank, event)

    def _apply_event(self, number: int, event: KvEvent) -> None:
        rank = self._ranks.setdefault(number, _Rank())
        match event:
            case BlockStored():
                self._store(number, rank, event)
            case BlockRemoved(block_hashes=hashes, medium=medium):
                self._remove(number, rank, [hash_bytes(h) for h in hashes], medium)
            case AllBlocksCleared():
                self._directory.drop(self._node_of(number))
                self._ranks[number] = _Rank()

    def _store(self, number: int, rank: _Rank, event: BlockStored) -> None:
        hashes = [hash_bytes(h) for h in event.block_hashes]
        added: list[BlockKey] = []
        for place, key in zip(hashes, self._keys(rank, hashes, event), strict=True):
            held = rank.held.get(place)
            if held is None:
                if key is None:
                    self.counts.orphans += 1
                    continue
                if len(rank.held) >= self._max_blocks:
                    self.counts.overflow += 1
                    continue
                held = rank.held[place] = _Held(key, set())
            if not any(tier_of(medium) is tier_of(event.medium) for medium in held.mediums):
                added.append(held.key)
            held.mediums.add(event.medium)
        if added:
            rank.seq += 1
            self._directory.stored(self._node_of(number), rank.seq, added, tier_of(event.medium))

    def _remove(self, number: int, rank: _Rank, hashes: list[bytes], medium: str | None) -> None:
        """A block is gone from a tier when no medium of that tier has it; without a medium it is gone altogether."""
        gone: dict[Tier, list[BlockKey]] = {}
        for place in hashes:
            held = rank.held.get(place)
            if held is None:
                continue
            before = {tier_of(m) for m in held.mediums}
            held.mediums -= held.mediums if medium is None else {medium}
            for tier in sorted(before - {tier_of(m) for m in held.mediums}):
                gone.setdefault(tier, []).append(held.key)
            if not held.mediums:
                del rank.held[place]
        for tier, keys in gone.items():
            rank.seq += 1
            self._directory.removed(self._node_of(number), rank.seq, keys, tier)

    def _keys(self, rank: _Rank, hashes: list[bytes], event: BlockStored) -> list[BlockKey] | list[BlockKey | None]:
        """Our keys of the event's blocks, None for those that have none."""
        if self._root is None:
            return hashes
        nothing: list[BlockKey | None] = [None] * len(hashes)
        if event.parent_block_hash is None:
            parent: BlockKey | None = self._root
        else:
            held = rank.held.get(hash_bytes(event.parent_block_hash))
            parent = None if held is None else held.key
        is_whole = len(event.token_ids) == len(hashes) * event.block_size and event.block_size == self._block_tokens
        is_plain = event.lora_id is None and event.lora_name is None and not any(event.extra_keys or ())
        if parent is None or not is_whole or not is_plain or not all(0 <= token < 1 << 32 for token in event.token_ids):
            return nothing
        return list(block_keys(parent, event.token_ids, event.block_size))
