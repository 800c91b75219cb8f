"""Which node can read which block: the conductor's prefix index, kept by the nodes' block events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvasir.core.errors import InvariantError
from kvasir.core.keys import BlockKey


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest contiguous prefix, in blocks, on each node that has any; `best` is the longest, `source` who has it.

    Nothing anywhere: `best` 0, `source` None. Ties go to the node that joined first.
    """

    blocks: dict[str, int]
    best: int
    source: str | None

    def on(self, node: str) -> int:
        return self.blocks.get(node, 0)


class _Progress(NamedTuple):
    """Whether an event is to be applied, and whether it shows that others were missed."""

    is_new: bool
    has_gap: bool


NO_MATCH = PrefixMatch({}, 0, None)


class BlockDirectory:
    """Block key → nodes, as one bitmask per key, so that a prefix is matched against all nodes at once.

    Soft state: an entry too many costs a recompute, never a wrong token. Each node numbers its events; after a gap the
    node is listed in `needs_resync` until its inventory arrives.
    """

    __slots__ = ("_bits", "_last_seq", "_masks", "_nodes", "_stale")

    def __init__(self) -> None:
        self._masks: dict[BlockKey, int] = {}
        self._nodes: list[str | None] = []  # bit → node
        self._bits: dict[str, int] = {}
        self._last_seq: dict[str, int] = {}
        self._stale: dict[str, None] = {}  # an ordered set

    def __len__(self) -> int:
        """Blocks known anywhere."""
        return len(self._masks)

    def match(self, keys: Sequence[BlockKey]) -> PrefixMatch:
        """One dictionary look-up per key until no node has them all; independent of the number of nodes."""
        get = self._masks.get
        alive = get(keys[0], 0) if keys else 0
        if not alive:
            return NO_MATCH
        blocks: dict[str, int] = {}
        best = len(keys)
        for index, key in enumerate(keys):
            still = alive & get(key, 0)
            if still != alive:
                if not still:
                    best = index
                    break
                self._set(blocks, alive & ~still, index)
                alive = still
        self._set(blocks, alive, best)
        first = (alive & -alive).bit_length() - 1
        return PrefixMatch(blocks, best, self._nodes[first])

    def holders(self, key: BlockKey) -> tuple[str, ...]:
        return self._names(self._masks.get(key, 0))

    def stored(self, node: str, seq: int, keys: Iterable[BlockKey]) -> bool:
        """Apply a node's event; returns whether it revealed a gap that was not known before."""
        is_new, has_gap = self._advance(node, seq)
        if is_new:
            self._add(node, keys)
        return has_gap

    def removed(self, node: str, seq: int, keys: Iterable[BlockKey]) -> bool:
        """As `stored`."""
        is_new, has_gap = self._advance(node, seq)
        if is_new:
            keep = ~(1 << self._bit(node))
            for key in keys:
                self._mask_out(key, keep)
        return has_gap

    def inventory(self, node: str, seq: int, keys: Iterable[BlockKey]) -> None:
        """Replace all that is known of the node by its own account as of event `seq`."""
        self.drop(node)
        self._add(node, keys)
        self._last_seq[node] = seq

    def drop(self, node: str) -> None:
        """The node is gone and its blocks with it. Takes time with the size of the directory; nodes die seldom."""
        self._last_seq.pop(node, None)
        self._stale.pop(node, None)
        bit = self._bits.pop(node, None)
        if bit is None:
            return
        self._nodes[bit] = None
        keep = ~(1 << bit)
        for key in [key for key, mask in self._masks.items() if mask & ~keep]:
            self._mask_out(key, keep)

    def needs_resync(self, node: str) -> bool:
        """Whether events of the node were missed since its last inventory."""
        return node in self._stale

    @property
    def stale_nodes(self) -> tuple[str, ...]:
        return tuple(self._stale)

    def check(self) -> None:
        """Raises InvariantError unless every mask names living nodes and bits and names agree."""
        known = sum(1 << bit for bit in self._bits.values())
        for key, mask in self._masks.items():
            if not mask or mask & ~known:
                raise InvariantError(f"block {key.hex()} is on nodes {mask:b}, known are {known:b}")
        if any(self._nodes[bit] != node for node, bit in self._bits.items()):
            raise InvariantError(f"bits {self._bits} and nodes {self._nodes} disagree")

    def _advance(self, node: str, seq: int) -> _Progress:
        last = self._last_seq.get(node)
        if last is not None and seq <= last:
            if seq > 1:
                return _Progress(is_new=False, has_gap=False)
            self.drop(node)  # its count started again, and so did the pool
            last = None
        has_gap = seq > (1 if last is None else last + 1) and node not in self._stale
        if has_gap:
            self._stale[node] = None
        self._last_seq[node] = seq
        return _Progress(is_new=True, has_gap=has_gap)

    def _add(self, node: str, keys: Iterable[BlockKey]) -> None:
        mask = 1 << self._bit(node)
        masks = self._masks
        for key in keys:
            masks[key] = masks.get(key, 0) | mask

    def _mask_out(self, key: BlockKey, keep: int) -> None:
        mask = self._masks.get(key, 0) & keep
        if mask:
            self._masks[key] = mask
        else:
            self._masks.pop(key, None)

    def _bit(self, node: str) -> int:
        bit = self._bits.get(node)
        if bit is None:
            bit = self._nodes.index(None) if None in self._nodes else len(self._nodes)
            self._nodes[bit : bit + 1] = [node]
            self._bits[node] = bit
        return bit

    def _names(self, mask: int) -> tuple[str, ...]:
        return tuple(node for bit, node in enumerate(self._nodes) if node is not None and mask >> bit & 1)

    def _set(self, blocks: dict[str, int], mask: int, length: int) -> None:
        while mask:
            low = mask & -mask
            node = self._nodes[low.bit_length() - 1]
            if node is not None:
                blocks[node] = length
            mask ^= low
