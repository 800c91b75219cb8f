"""From what the conductor hears of the nodes' blocks to what subscribers are told. No sockets, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvasir.cluster.kv_events.format import (
    MEDIUMS,
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    KvEvent,
    WireFormat,
)
from kvasir.cluster.kv_events.lineage import Lineage, token_list
from kvasir.core.events import BlocksRemoved, BlocksStored, Event, Inventory, NodeLost
from kvasir.core.keys import BlockKey
from kvasir.core.tier import Tier

SNAPSHOT_BLOCKS = 4096
"""Blocks in one batch of a snapshot: a megabyte or two with their tokens."""

_BITS = {Tier.DRAM: 1, Tier.SSD: 2}


class _Node:
    """What subscribers were told that a node has, and where its own numbering of events is."""

    __slots__ = ("held", "last_seq")

    def __init__(self) -> None:
        self.held: dict[BlockKey, int] = {}  # key → the tiers' bits, in the order of arrival
        self.last_seq = 0


class EventStream:
    """Takes the conductor's events, gives batches of KV events: one data-parallel rank for each node.

    A block whose tokens are not known (read back from an SSD after a restart) is told without them.
    """

    def __init__(self, lineage: Lineage, wire: WireFormat):
        self.lineage = lineage
        self._wire = wire
        self._nodes: dict[str, _Node] = {}
        self._untold: dict[str, list[KvEvent]] = {}
        self._ranks: dict[str, int] = {}
        self.unknown_blocks = 0

    def rank_of(self, node: str) -> int:
        """Nodes are numbered in the order in which they were first heard of, and keep their number."""
        return self._ranks.setdefault(node, len(self._ranks))

    def hear(self, event: Event) -> bool:
        """Take an event of any kind; whether there is something to tell now."""
        match event:
            case BlocksStored(node=node, seq=seq, keys=keys, tier=tier):
                if self._is_news(node, seq):
                    self._store(node, keys, tier)
            case BlocksRemoved(node=node, seq=seq, keys=keys, tier=tier):
                if self._is_news(node, seq):
                    self._remove(node, keys, tier)
            case Inventory(node=node, seq=seq, keys=keys, ssd_keys=ssd_keys):
                self._node(node).last_seq = seq
                self._replace(node, keys, Tier.DRAM)
                self._replace(node, ssd_keys, Tier.SSD)
            case NodeLost(node=node):
                self._clear(node)
        return bool(self._untold)

    def take(self) -> list[tuple[str, tuple[KvEvent, ...]]]:
        """What is to be told since the last time: node and events, in order."""
        told = [(node, tuple(events)) for node, events in self._untold.items()]
        self._untold.clear()
        return told

    def snapshot(self) -> list[tuple[str, tuple[KvEvent, ...]]]:
        """All that subscribers were told and that still holds, as batches that begin by clearing each node."""
        batches: list[tuple[str, tuple[KvEvent, ...]]] = []
        for name, node in self._nodes.items():
            batches.append((name, (AllBlocksCleared(),)))
            for tier, bit in _BITS.items():
                keys = [key for key, bits in node.held.items() if bits & bit]
                parts = (keys[at : at + SNAPSHOT_BLOCKS] for at in range(0, len(keys), SNAPSHOT_BLOCKS))
                batches.extend((name, tuple(self._stored(part, tier))) for part in parts)
        return batches

    def _node(self, name: str) -> _Node:
        self.rank_of(name)
        return self._nodes.setdefault(name, _Node())

    def _is_news(self, name: str, seq: int) -> bool:
        """As the directory sees it: an old number is old news, unless the node's count began again, and so did its pool."""
        node = self._node(name)
        if seq <= node.last_seq:
            if seq > 1:
                return False
            self._clear(name)
        self._node(name).last_seq = seq
        return True

    def _store(self, name: str, keys: Iterable[BlockKey], tier: Tier) -> None:
        held, bit = self._node(name).held, _BITS[tier]
        new = [key for key in dict.fromkeys(keys) if not held.get(key, 0) & bit]
        for key in new:
            held[key] = held.get(key, 0) | bit
        if new:
            self._untold.setdefault(name, []).extend(self._stored(new, tier))

    def _remove(self, name: str, keys: Iterable[BlockKey], tier: Tier) -> None:
        held, bit = self._node(name).held, _BITS[tier]
        gone = [key for key in dict.fromkeys(keys) if held.get(key, 0) & bit]
        for key in gone:
            held[key] &= ~bit
            if not held[key]:
                del held[key]
        if gone:
            event = BlockRemoved([self._wire.hash_of(key) for key in gone], MEDIUMS[tier])
            self._untold.setdefault(name, []).append(event)

    def _replace(self, name: str, keys: Sequence[BlockKey], tier: Tier) -> None:
        kept = set(keys)
        held = self._node(name).held
        self._remove(name, [key for key, bits in held.items() if bits & _BITS[tier] and key not in kept], tier)
        self._store(name, keys, tier)

    def _clear(self, name: str) -> None:
        node = self._nodes.pop(name, None)
        if node is not None and node.held:
            self._untold[name] = [AllBlocksCleared()]  # what was to be told before is moot

    def _stored(self, keys: list[BlockKey], tier: Tier) -> Iterator[BlockStored]:
        """One event for each run of blocks that follow on each other, and one for all whose tokens are not known."""
        unknown: list[BlockKey] = []
        run = _Run()
        for key in keys:
            ancestry = self.lineage.get(key)
            if ancestry is None:
                unknown.append(key)
                continue
            if run.keys and ancestry.parent != run.keys[-1]:
                yield self._run(run, tier)
                run = _Run()
            if not run.keys:
                run.parent = ancestry.parent
            run.keys.append(key)
            run.tokens.append(ancestry.tokens)
            run.salts.append(ancestry.salt)
        if run.keys:
            yield self._run(run, tier)
        if unknown:
            self.unknown_blocks += len(unknown)
            run = _Run()
            run.keys = unknown
            yield self._run(run, tier)

    def _run(self, run: _Run, tier: Tier) -> BlockStored:
        hashes: list[BlockHash] = [self._wire.hash_of(key) for key in run.keys]
        extra = [None if salt is None else [salt] for salt in run.salts]
        return BlockStored(
            block_hashes=hashes,
            parent_block_hash=None if run.parent is None else self._wire.hash_of(run.parent),
            token_ids=token_list(b"".join(run.tokens)),
            block_size=self.lineage.block_tokens,
            lora_id=None,
            medium=MEDIUMS[tier],
            lora_name=None,
            extra_keys=extra if any(extra) else None,
        )


class _Run:
    """Blocks that will be one event."""

    __slots__ = ("keys", "parent", "salts", "tokens")

    def __init__(self) -> None:
        self.keys: list[BlockKey] = []
        self.parent: BlockKey | None = None
        self.tokens: list[bytes] = []
        self.salts: list[str | None] = []
