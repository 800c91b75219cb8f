"""Which node can read which block: the conductor's prefix index, kept by the nodes' block events."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, repeat
from typing import Final

from kvasir.core.errors import InvariantError
from kvasir.core.keys import BlockKey
from kvasir.core.tier import Tier
from kvasir.pool.match import PrefixMatch, Runs

__all__ = ["BlockDirectory", "PrefixMatch"]

CHUNK: Final = 512
"""Keys that are looked up at a time: few enough to waste little behind the end of a prefix, enough to stay at C speed."""

Holders = tuple[int, int]
"""Masks of the nodes that have a block in DRAM, and of those that have it on SSD. Blocks of the same holders share one tuple
where they can, because that is compared at a glance."""

NOBODY: Holders = (0, 0)


class BlockDirectory:
    """Block key → nodes, as one bitmask per tier, so that a prefix is matched against all nodes at once.

    Soft state: an entry too many costs a recompute, never a wrong token. Each node numbers its events; after a gap the
    node is listed in `needs_resync` until its inventory arrives.
    """

    __slots__ = ("_bits", "_holders", "_last_seq", "_nodes", "_stale", "generation")

    def __init__(self) -> None:
        self._holders: dict[BlockKey, Holders] = {}
        self._nodes: tuple[str | None, ...] = ()  # bit → node; replaced, not changed, as matches keep it
        self._bits: dict[str, int] = {}
        self._last_seq: dict[str, int] = {}
        self._stale: dict[str, None] = {}  # an ordered set
        self.generation = 0
        """Grows when a node gets a bit or loses it: masks made of `bit_of` before are out of date."""

    def __len__(self) -> int:
        """Blocks known anywhere."""
        return len(self._holders)

    def match(self, keys: Sequence[BlockKey]) -> PrefixMatch:
        """Look-ups and comparisons at C speed; a Python step only where holders change, none for each node.

        Ends with the chunk in which the last node's prefix does.
        """
        get = self._holders.get
        same = get(keys[0]) if keys else None
        if same is None:
            return PrefixMatch((), (), self._nodes)
        dram, both = _Prefixes(same[0]), _Prefixes(same[0] | same[1])
        for start in range(0, len(keys), CHUNK):
            found = list(map(get, keys[start : start + CHUNK]))
            # two sets of holders that differ take long to compare: the last block mostly tells without
            if found[-1] is not same or found.count(same) < len(found):
                same = _narrow(dram, both, found, start)
                if not both.alive:
                    break
        return PrefixMatch(dram.runs(len(keys)), both.runs(len(keys)), self._nodes)

    def bit_of(self, node: str) -> int:
        """The node's bit in the masks of `runs`, as a mask of that one bit; 0 for a node that holds nothing and never did."""
        bit = self._bits.get(node)
        return 0 if bit is None else 1 << bit

    def replicas(self, key: BlockKey) -> int:
        """How many nodes have the block in DRAM."""
        return self._holders.get(key, NOBODY)[0].bit_count()

    def holders(self, key: BlockKey, tier: Tier = Tier.DRAM) -> tuple[str, ...]:
        mask = self._holders.get(key, NOBODY)[_PLACE[tier]]
        return tuple(node for bit, node in enumerate(self._nodes) if node is not None and mask >> bit & 1)

    def stored(self, node: str, seq: int, keys: Sequence[BlockKey], tier: Tier = Tier.DRAM) -> bool:
        """Apply a node's event; returns whether it revealed a gap that was not known before."""
        is_new, has_gap = self._advance(node, seq)
        if is_new:
            self._add(node, keys, tier)
        return has_gap

    def removed(self, node: str, seq: int, keys: Sequence[BlockKey], tier: Tier = Tier.DRAM) -> bool:
        """As `stored`."""
        is_new, has_gap = self._advance(node, seq)
        if is_new:
            self._remove(keys, _pair(tier, 1 << self._bit(node)))
        return has_gap

    def inventory(self, node: str, seq: int, keys: Sequence[BlockKey], ssd_keys: Sequence[BlockKey] = ()) -> None:
        """Replace all that is known of the node by its own account as of event `seq`: blocks in DRAM, and on its SSD."""
        self.drop(node)
        self._add(node, keys, Tier.DRAM)
        self._add(node, ssd_keys, Tier.SSD)
        self._last_seq[node] = seq

    def drop(self, node: str) -> None:
        """The node is gone and its blocks with it. Takes time with the size of the directory; nodes die seldom."""
        self._last_seq.pop(node, None)
        self._stale.pop(node, None)
        bit = self._bits.pop(node, None)
        if bit is None:
            return
        self._name(bit, None)
        mask = 1 << bit
        self._remove([key for key, (dram, ssd) in self._holders.items() if (dram | ssd) & mask], (mask, mask))

    def needs_resync(self, node: str) -> bool:
        """Whether events of the node were missed since its last inventory."""
        return node in self._stale

    @property
    def stale_nodes(self) -> tuple[str, ...]:
        return tuple(self._stale)

    def check(self) -> None:
        """Raises InvariantError unless every mask names living nodes and bits and names agree."""
        known = sum(1 << bit for bit in self._bits.values())
        for key, (dram, ssd) in self._holders.items():
            if not dram | ssd or (dram | ssd) & ~known:
                raise InvariantError(f"block {key.hex()} is on nodes {dram:b} and SSDs {ssd:b}, known are {known:b}")
        if {node: bit for bit, node in enumerate(self._nodes) if node is not None} != self._bits:
            raise InvariantError(f"bits {self._bits} and nodes {self._nodes} disagree")

    def _advance(self, node: str, seq: int) -> tuple[bool, bool]:
        """Whether the event is to be applied, and whether it shows that others were missed."""
        last = self._last_seq.get(node)
        if last is not None and seq <= last:
            if seq > 1:
                return False, False
            self.drop(node)  # its count started again, and so did the pool
            last = None
        has_gap = seq > (1 if last is None else last + 1) and node not in self._stale
        if has_gap:
            self._stale[node] = None
        self._last_seq[node] = seq
        return True, has_gap

    def _add(self, node: str, keys: Sequence[BlockKey], tier: Tier) -> None:
        added = _pair(tier, 1 << self._bit(node))  # a node that was heard of has a bit, whatever it holds
        holders = self._holders
        held = list(map(holders.get, keys))
        if held.count(None) == len(held):
            holders.update(zip(keys, repeat(added), strict=False))
            return
        joined = {old: (old[0] | added[0], old[1] | added[1]) if old else added for old in set(held)}
        holders.update(zip(keys, map(joined.__getitem__, held), strict=True))

    def _remove(self, keys: Sequence[BlockKey], gone: Holders) -> None:
        holders = self._holders
        start = 0
        for old, same in groupby(list(map(holders.get, keys))):  # what was stored together mostly goes together
            end = start + len(list(same))
            if old is not None:
                left = (old[0] & ~gone[0], old[1] & ~gone[1])
                if left == NOBODY:
                    for key in keys[start:end]:
                        holders.pop(key, None)
                else:
                    holders.update(zip(keys[start:end], repeat(left), strict=False))
            start = end

    def _bit(self, node: str) -> int:
        bit = self._bits.get(node)
        if bit is None:
            bit = self._nodes.index(None) if None in self._nodes else len(self._nodes)
            self._name(bit, node)
            self._bits[node] = bit
        return bit

    def _name(self, bit: int, node: str | None) -> None:
        self._nodes = (*self._nodes[:bit], node, *self._nodes[bit + 1 :])
        self.generation += 1


_PLACE = {Tier.DRAM: 0, Tier.SSD: 1}


_DRAM: Final = Tier.DRAM


def _pair(tier: Tier, mask: int) -> Holders:
    return (mask, 0) if tier is _DRAM else (0, mask)


class _Prefixes:
    """The nodes whose prefix goes on, and where those of others ended."""

    __slots__ = ("alive", "ends")

    def __init__(self, alive: int):
        self.alive = alive
        self.ends: list[tuple[int, int]] = []

    def runs(self, num_keys: int) -> Runs:
        return (*self.ends, (self.alive, num_keys)) if self.alive else tuple(self.ends)


def _narrow(dram: _Prefixes, both: _Prefixes, found: list[Holders | None], place: int) -> Holders:
    """Take account of the holders of block `place` and on; the last of them. In one piece: most of a match's Python is here."""
    holders = NOBODY
    dram_alive, both_alive = dram.alive, both.alive
    for held, same in groupby(found):
        holders = held or NOBODY
        in_dram, on_ssd = holders
        if over := dram_alive & ~in_dram:
            dram.ends.append((over, place))
            dram_alive ^= over
        if over := both_alive & ~(in_dram | on_ssd):
            both.ends.append((over, place))
            both_alive ^= over
            if not both_alive:
                break
        place += len(list(same))
    dram.alive, both.alive = dram_alive, both_alive
    return holders
