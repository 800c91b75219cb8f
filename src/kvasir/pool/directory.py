"""Which node can read which block: the conductor's prefix index, kept by the nodes' block events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvasir.core.errors import InvariantError
from kvasir.core.keys import BlockKey
from kvasir.core.tier import Tier
from kvasir.pool.match import PrefixMatch, Runs

__all__ = ["BlockDirectory", "PrefixMatch"]


class Holders:
    """The nodes that have a block, as masks, in DRAM and on SSD. Never changed: blocks of the same holders may share one."""

    __slots__ = ("dram", "ssd")

    def __init__(self, dram: int, ssd: int):
        self.dram = dram
        self.ssd = ssd

    def with_(self, more: Holders) -> Holders:
        return Holders(self.dram | more.dram, self.ssd | more.ssd)

    def without(self, gone: Holders) -> Holders | None:
        """None when nobody is left."""
        dram, ssd = self.dram & ~gone.dram, self.ssd & ~gone.ssd
        return Holders(dram, ssd) if dram | ssd else None


NOBODY: Final = Holders(0, 0)


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
        """One look-up a block, as far as any node's prefix reaches; more only where holders change, and none for each node."""
        holders = self._holders
        same = holders.get(keys[0]) if keys else None
        if same is None:
            return PrefixMatch((), (), self._nodes)
        dram, both = _Prefixes(same.dram), _Prefixes(same.dram | same.ssd)
        for place, key in enumerate(keys):
            held = holders.get(key)
            if held is same:
                continue
            same = held if held is not None else NOBODY
            dram.narrow(same.dram, place)
            both.narrow(same.dram | same.ssd, place)
            if not both.alive:
                break
        return PrefixMatch(dram.runs(len(keys)), both.runs(len(keys)), self._nodes)

    def bit_of(self, node: str) -> int:
        """The node's bit in the masks of `runs`, as a mask of that one bit; 0 for a node that holds nothing and never did."""
        bit = self._bits.get(node)
        return 0 if bit is None else 1 << bit

    def replicas(self, key: BlockKey) -> int:
        """How many nodes have the block in DRAM."""
        held = self._holders.get(key)
        return held.dram.bit_count() if held is not None else 0

    def holders(self, key: BlockKey, tier: Tier = Tier.DRAM) -> tuple[str, ...]:
        held = self._holders.get(key, NOBODY)
        mask = held.dram if tier is _DRAM else held.ssd
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
            self._remove(keys, self._alone(node, tier))
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
        gone = Holders(mask, mask)
        self._remove([key for key, held in self._holders.items() if (held.dram | held.ssd) & mask], gone)

    def needs_resync(self, node: str) -> bool:
        """Whether events of the node were missed since its last inventory."""
        return node in self._stale

    @property
    def stale_nodes(self) -> tuple[str, ...]:
        return tuple(self._stale)

    def check(self) -> None:
        """Raises InvariantError unless every mask names living nodes and bits and names agree."""
        known = sum(1 << bit for bit in self._bits.values())
        for key, held in self._holders.items():
            if not held.dram | held.ssd or (held.dram | held.ssd) & ~known:
                raise InvariantError(f"block {key.hex()} is on nodes {held.dram:b} and SSDs {held.ssd:b}, known are {known:b}")
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
        holders = self._holders
        alone = after = self._alone(node, tier)
        before: Holders | None = None
        for key in keys:
            held = holders.setdefault(key, alone)
            if held is alone:
                continue
            if held is not before:  # what was stored together mostly has the same holders
                before, after = held, held.with_(alone)
            holders[key] = after

    def _remove(self, keys: Sequence[BlockKey], gone: Holders) -> None:
        holders = self._holders
        before: Holders | None = None
        after: Holders | None = None
        for key in keys:
            held = holders.get(key)
            if held is None:
                continue
            if held is not before:  # and mostly goes together
                before, after = held, held.without(gone)
            if after is None:
                del holders[key]
            else:
                holders[key] = after

    def _alone(self, node: str, tier: Tier) -> Holders:
        """A node that was heard of has a bit, whatever it holds."""
        mask = 1 << self._bit(node)
        return Holders(mask, 0) if tier is _DRAM else Holders(0, mask)

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


_DRAM: Final = Tier.DRAM


class _Prefixes:
    """The nodes whose prefix goes on, and where those of others ended."""

    __slots__ = ("alive", "ends")

    def __init__(self, alive: int):
        self.alive = alive
        self.ends: list[tuple[int, int]] = []

    def narrow(self, holders: int, place: int) -> None:
        """Only these have block `place`."""
        if over := self.alive & ~holders:
            self.ends.append((over, place))
            self.alive ^= over

    def runs(self, num_keys: int) -> Runs:
        return (*self.ends, (self.alive, num_keys)) if self.alive else tuple(self.ends)
