"""Token ids for the blocks that a trace only names, so that a replay's prefix hits are real."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvasir.core.errors import ConfigError
from kvasir.workload.trace import TraceRequest

_ID_SPACE = 2**48
"""Hash ids below this get distinct leading tokens; the published traces stay below 2**20."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)


@dataclass(frozen=True, slots=True)
class BlockContent:
    """The tokens of every block: a pure function of (seed, hash id, position), the same on every machine.

    `token_ids` are those that may appear, without special tokens: a `range(1000, vocab_size)` or a list. A block starts
    with its hash id written in base `len(token_ids)`, so that two ids never have the same content as long as a block
    has room for the digits; the rest is a SplitMix64 stream (Steele, Lea, Flood, OOPSLA 2014).
    """

    token_ids: Sequence[int]
    block_tokens: int
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.token_ids) < 2:
            raise ConfigError(f"not a vocabulary: {len(self.token_ids)} token ids; expected at least 2")
        if self.block_tokens < 1:
            raise ConfigError(f"not a block size: {self.block_tokens} tokens; expected at least 1")

    def prompt(self, request: TraceRequest) -> list[int]:
        """The request's prompt, `input_tokens` long; the last block is cut to fit."""
        indices = self._indices(np.asarray(request.hash_ids, np.uint64))
        flat: list[int] = indices.reshape(-1)[: request.input_tokens].tolist()
        return [self.token_ids[i] for i in flat]

    def _indices(self, ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Indices into `token_ids`, shape (ids, block_tokens)."""
        size = np.uint64(len(self.token_ids))
        positions = np.arange(self.block_tokens, dtype=np.uint64)
        streams = _splitmix(ids + _splitmix(np.array([self.seed % 2**64], np.uint64)))
        tokens = _splitmix(streams[:, None] + positions * _GOLDEN) % size
        for place, power in enumerate(self._digit_places()):
            # A shift that depends on the seed alone keeps the digits of two ids apart and hides their zeros.
            shift = _splitmix(np.array([(self.seed + place + 1) % 2**64], np.uint64))[0] % size
            tokens[:, place] = (ids // np.uint64(power) + shift) % size
        return tokens

    def _digit_places(self) -> list[int]:
        """Powers of the base, smallest first, that write an id; as many as are needed and fit into a block."""
        base = len(self.token_ids)
        powers = [1]
        while powers[-1] * base < _ID_SPACE and len(powers) < self.block_tokens:
            powers.append(powers[-1] * base)
        return powers


def _splitmix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = state + _GOLDEN
    for shift, factor in _MIX:
        mixed = (mixed ^ (mixed >> shift)) * factor
    return mixed ^ (mixed >> _LAST_SHIFT)
