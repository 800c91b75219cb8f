"""What a block key stands for: its parent and its tokens, remembered for as long as there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from kvasir.core.keys import BlockKey

CAPACITY = 1 << 16
"""Blocks remembered: 4M tokens at 64 a block, and about 30 MiB."""


class Ancestry(NamedTuple):
    """A block: `parent` is None for the first of a sequence, which has the `salt`'s digest if there is a salt."""

    parent: BlockKey | None
    tokens: bytes
    salt: str | None


class Lineage:
    """Block key → parent and tokens, the least recently used forgotten first."""

    def __init__(self, block_tokens: int, capacity: int = CAPACITY):
        self.block_tokens = block_tokens
        self._capacity = capacity
        self._known: OrderedDict[BlockKey, Ancestry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def learn(self, keys: Sequence[BlockKey], tokens: Sequence[int], *, parent: BlockKey | None, salt: str = "") -> None:
        """`keys` are those of the full blocks of `tokens`; the first follows on `parent`, or begins a sequence."""
        raw = np.asarray(tokens, dtype="<u4").tobytes()
        step = 4 * self.block_tokens
        digest = salt_digest(salt) if salt and parent is None else None
        for at, key in enumerate(keys):
            if key in self._known:
                self._known.move_to_end(key)
            else:
                self._known[key] = Ancestry(parent, raw[at * step : (at + 1) * step], digest)
            parent, digest = key, None
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def get(self, key: BlockKey) -> Ancestry | None:
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
        return found


def token_list(raw: bytes) -> list[int]:
    """The token ids in an Ancestry."""
    tokens: list[int] = np.frombuffer(raw, dtype="<u4").tolist()
    return tokens


def salt_digest(salt: str) -> str:
    """Tells one salt from another without telling it."""
    return sha256(b"kvasir-salt" + salt.encode()).hexdigest()[:16]
