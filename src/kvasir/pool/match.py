"""What a directory knows of one prompt: how long a prefix each node has, by runs of nodes or node by node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Runs = tuple[tuple[int, int], ...]
"""(mask of the nodes whose prefix ends there, its length in blocks), shortest first; no node is in two, no length is 0."""


def bits_of(mask: int) -> list[int]:
    """The numbers of the bits that are set, lowest first."""
    bits = []
    while mask:
        lowest = mask & -mask
        bits.append(lowest.bit_length() - 1)
        mask ^= lowest
    return bits


class PrefixMatch:
    """The longest contiguous prefix, in blocks, on each node that has any. A snapshot.

    Two measures: what is in a node's DRAM (`runs`, `blocks`, `on`, `best`, `source`), and what is there when DRAM and SSD
    count together (`runs_any`, `blocks_any`, `on_any`, `best_any`, `source_any`). `best` is the longest, `source` who has
    it: 0 and None when nobody has any, of several the node with the lowest bit, which is the first that joined unless a
    node left before. What is by node's name is made when it is asked for; `runs` cost nothing.
    """

    __slots__ = ("_blocks", "_blocks_any", "nodes", "runs", "runs_any")

    def __init__(self, runs: Runs, runs_any: Runs, nodes: tuple[str | None, ...]):
        self.runs = runs
        self.runs_any = runs_any
        self.nodes = nodes  # by bit
        self._blocks: dict[str, int] | None = None
        self._blocks_any: dict[str, int] | None = None

    @property
    def best(self) -> int:
        return self.runs[-1][1] if self.runs else 0

    @property
    def best_any(self) -> int:
        return self.runs_any[-1][1] if self.runs_any else 0

    @property
    def source(self) -> str | None:
        return self._first(self.runs)

    @property
    def source_any(self) -> str | None:
        return self._first(self.runs_any)

    @property
    def blocks(self) -> dict[str, int]:
        """By node, only those that have any; takes time with their number."""
        if self._blocks is None:
            self._blocks = self._by_name(self.runs)
        return self._blocks

    @property
    def blocks_any(self) -> dict[str, int]:
        if self._blocks_any is None:
            self._blocks_any = self._by_name(self.runs_any)
        return self._blocks_any

    def on(self, node: str) -> int:
        return self.blocks.get(node, 0)

    def on_any(self, node: str) -> int:
        return self.blocks_any.get(node, 0)

    def masks_of(self, nodes: Iterable[str]) -> list[int]:
        """The bit of each of these nodes in a mask; 0 for one that the directory has not heard of."""
        bits = {node: bit for bit, node in enumerate(self.nodes)}
        return [1 << bits[node] if node in bits else 0 for node in nodes]

    def rows_on(self, nodes: Sequence[str]) -> list[list[int]]:
        """By bit, the rows of `nodes` that are the node of that bit."""
        bits = {node: bit for bit, node in enumerate(self.nodes)}
        rows: list[list[int]] = [[] for _ in self.nodes]
        for row, node in enumerate(nodes):
            bit = bits.get(node)
            if bit is not None:
                rows[bit].append(row)
        return rows

    def names(self, mask: int) -> tuple[str, ...]:
        """The nodes of a mask, by bit."""
        return tuple(self._named(mask))

    def _first(self, runs: Runs) -> str | None:
        if not runs:
            return None
        mask = runs[-1][0]
        return self.nodes[(mask & -mask).bit_length() - 1]

    def _by_name(self, runs: Runs) -> dict[str, int]:
        return {node: length for mask, length in runs for node in self._named(mask)}

    def _named(self, mask: int) -> list[str]:
        names = []
        for bit in bits_of(mask):
            node = self.nodes[bit]
            if node is not None:
                names.append(node)
        return names

    def __repr__(self) -> str:
        return f"PrefixMatch(blocks={self.blocks}, blocks_any={self.blocks_any})"
