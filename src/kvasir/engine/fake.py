"""An engine without a model: it takes the cost model's time and draws tokens that any wrong KV would change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import numpy.typing as npt

from kvasir.core.errors import KvLost
from kvasir.costs.model import CostModel
from kvasir.engine.interface import ModelSpec, SampledToken, SequenceSlice, Slots, StepResult
from kvasir.engine.landing import LOOK_S, PATIENCE_S, Landing

_WORD = np.dtype("<u4")


class FakeEngine:
    """`Engine` for tests and rehearsals of the whole cluster.

    The "KV" of the token t at position p is one 32-bit word, at word p % block_tokens of its block's slot:

        word[p] = (word[p - 1] + (t + 1) * (2 p + 1)) mod 2^32

    and the next token is drawn from the last words of all the sequence's blocks. So it depends on every token before it and
    on nothing else: a prompt answered in chunks, from a cached prefix, after a hand-off or by the other replica gives the same
    tokens, and one wrong or stale block gives others. An end-of-sequence token is never drawn. A step takes the
    predicted seconds of its prefill chunks, one after another, and of its decode batch.
    """

    def __init__(
        self, spec: ModelSpec, cost_model: CostModel, *, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    ) -> None:
        self.spec = spec
        self._costs = cost_model
        self._sleep = sleep
        self._slots: npt.NDArray[np.uint32] | None = None
        self._landing: Landing | None = None

    def attach(self, slots: Slots) -> None:
        count = len(slots.memory) // slots.stride
        rows = slots.memory[: count * slots.stride].reshape(count, slots.stride)
        self._landing = Landing(slots.missing, self.spec.shape.num_layers, self.spec.block_tokens)
        self._slots = rows[:, : _WORD.itemsize * self.spec.block_tokens].view(_WORD)  # [slots, block_tokens]

    async def step(self, slices: Sequence[SequenceSlice]) -> StepResult:
        seconds = self._seconds(slices)
        landing = self._landed()
        landing.begin(slices)
        await self._sleep(seconds)
        give_up = PATIENCE_S
        while not landing.is_here(self.spec.shape.num_layers - 1):
            if (give_up := give_up - LOOK_S) < 0.0:
                raise KvLost([s.request_id for s in slices])
            await self._sleep(LOOK_S)
        for s in slices:
            self._write(s)
        return StepResult({s.request_id: self._draw(s) for s in slices if s.sampling is not None}, seconds)

    async def close(self) -> None:
        self._slots = None

    def _seconds(self, slices: Sequence[SequenceSlice]) -> float:
        decodes = [s for s in slices if _is_decode(s)]
        prefill_s = sum(self._costs.prefill_s(len(s.tokens), s.start) for s in slices if not _is_decode(s))
        if not decodes:
            return prefill_s
        return prefill_s + self._costs.decode_step_s(len(decodes), sum(s.start + 1 for s in decodes))

    def _write(self, s: SequenceSlice) -> None:
        positions = np.arange(s.start, s.start + len(s.tokens), dtype=np.uint32)
        terms = (np.asarray(s.tokens, dtype=np.uint32) + np.uint32(1)) * (np.uint32(2) * positions + np.uint32(1))
        before = self._words(s, np.array([s.start - 1])) if s.start else np.zeros(1, np.uint32)
        words = np.cumsum(terms, dtype=np.uint32) + before
        blocks, offsets = np.divmod(positions, self.spec.block_tokens)
        self._attached()[np.asarray(s.pages)[blocks], offsets] = words

    def _draw(self, s: SequenceSlice) -> SampledToken:
        length = s.start + len(s.tokens)
        last_of_blocks = np.append(np.arange(self.spec.block_tokens - 1, length - 1, self.spec.block_tokens), length - 1)
        total = int(self._words(s, last_of_blocks).sum(dtype=np.uint64))
        token = (total * 2654435761 >> 16) % self.spec.shape.vocab  # Knuth's multiplicative hash
        while token in self.spec.eos_token_ids:
            token = (token + 1) % self.spec.shape.vocab
        return SampledToken(token)

    def _words(self, s: SequenceSlice, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        blocks, offsets = np.divmod(positions, self.spec.block_tokens)
        words: npt.NDArray[np.uint32] = self._attached()[np.asarray(s.pages)[blocks], offsets]
        return words

    def _attached(self) -> npt.NDArray[np.uint32]:
        if self._slots is None:
            raise RuntimeError("step: expected an open engine with an arena attached")
        return self._slots

    def _landed(self) -> Landing:
        if self._landing is None:
            raise RuntimeError("step: expected an open engine with an arena attached")
        return self._landing


def _is_decode(s: SequenceSlice) -> bool:
    """A lone token after which none is drawn is a very short chunk of a prompt."""
    return len(s.tokens) == 1 and s.start > 0 and s.sampling is not None
