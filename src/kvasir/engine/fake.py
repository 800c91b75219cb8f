"""An engine without a model: it takes the cost model's time and draws tokens that any wrong KV would change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvasir.core.errors import KvLost
from kvasir.costs.model import CostModel
from kvasir.engine.interface import ModelSpec, SampledToken, SequenceSlice, Slots, Stage, StepResult, StreamRows
from kvasir.engine.landing import LOOK_S, PATIENCE_S, Landing
from kvasir.engine.stream import Stream

_WORD = np.dtype("<u4")

Words = npt.NDArray[np.uint32]
Positions = npt.NDArray[np.int64]


class FakeEngine:
    """`Engine` for tests and rehearsals of the whole cluster.

    The "KV" of the token t at position p is one 32-bit word, at word p % block_tokens of its block's slot:

        word[p] = (word[p - 1] + (t + 1) * (2 p + 1)) mod 2^32

    and the next token is drawn from the last words of all the sequence's blocks. So it depends on every token before it and
    on nothing else: a prompt answered in chunks, from a cached prefix, after a hand-off or by the other replica gives the same
    tokens, and one wrong or stale block gives others. An end-of-sequence token is never drawn. A step takes the
    predicted seconds of its prefill chunks, one after another, and of its decode batch.

    The first stage of a pipeline writes the words, and passes each on as its token's row. The last computes the words too,
    and from the first that differs from its row or from the pages on it turns every bit: a row that is lost or foreign gives
    other tokens as well. A stage takes its layers' share of the seconds.
    """

    def __init__(
        self, spec: ModelSpec, cost_model: CostModel, *, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    ) -> None:
        self.spec = spec
        self._costs = cost_model
        self._sleep = sleep
        self._arena: _Arena | None = None

    def attach(self, slots: Slots) -> None:
        count = len(slots.memory) // slots.stride
        rows = slots.memory[: count * slots.stride].reshape(count, slots.stride)
        self._arena = _Arena(
            rows[:, : _WORD.itemsize * self.spec.block_tokens].view(_WORD),
            Landing(slots.missing, self.spec.shape.num_layers, self.spec.block_tokens),
            Stream(slots, self.spec),
        )

    async def step(self, slices: Sequence[SequenceSlice]) -> StepResult:
        arena = self._attached()
        for s in slices:
            arena.stream.check(s)
        seconds = self._seconds(slices)
        arena.landing.begin(slices)
        await self._sleep(seconds)
        give_up = PATIENCE_S
        while not arena.landing.is_here(self.spec.shape.num_layers - 1):
            if (give_up := give_up - LOOK_S) < 0.0:
                raise KvLost([s.request_id for s in slices])
            await self._sleep(LOOK_S)
        for s in slices:
            self._compute(s)
        return StepResult({s.request_id: self._draw(s) for s in slices if s.sampling is not None}, seconds)

    async def close(self) -> None:
        self._arena = None

    def _seconds(self, slices: Sequence[SequenceSlice]) -> float:
        decodes = [s for s in slices if _is_decode(s)]
        prefill_s = sum(self._prefill_s(s) for s in slices if not _is_decode(s))
        if not decodes:
            return prefill_s
        return prefill_s + self._costs.decode_step_s(len(decodes), sum(s.start + 1 for s in decodes))

    def _prefill_s(self, s: SequenceSlice) -> float:
        whole = self._costs.prefill_s(len(s.tokens), s.start)
        return whole if s.stage is None else whole * (s.stage.last - s.stage.first) / self.spec.shape.num_layers

    def _compute(self, s: SequenceSlice) -> None:
        stage = s.stage or Stage(0, self.spec.shape.num_layers, reads=None, writes=None)
        if stage.reads is None:
            words = self._new_words(s)
            self._put(s, words)
        else:
            words = np.concatenate(self._row_words(stage.reads, len(s.tokens)))
            if stage.writes is None:
                self._put(s, self._verified(s, words))
        if stage.writes is not None:
            views = self._row_words(stage.writes, len(words))
            for view, part in zip(views, np.split(words, np.cumsum([len(v) for v in views])[:-1]), strict=True):
                view[:] = part

    def _new_words(self, s: SequenceSlice) -> Words:
        terms = (np.asarray(s.tokens, dtype=np.uint32) + np.uint32(1)) * (2 * _positions(s) + 1).astype(np.uint32)
        before = self._words(s, np.array([s.start - 1])) if s.start else np.zeros(1, np.uint32)
        words: Words = np.cumsum(terms, dtype=np.uint32) + before
        return words

    def _verified(self, s: SequenceSlice, rows: Words) -> Words:
        """The new words; inverted from the first on that is not in its row and in the pages."""
        words = self._new_words(s)
        is_wrong = np.logical_or.accumulate((rows != words) | (self._words(s, _positions(s)) != words))
        return np.where(is_wrong, ~words, words)

    def _row_words(self, rows: StreamRows, count: int) -> list[Words]:
        """The first word of each row, as views [n] of the arena."""
        parts = self._attached().stream.parts(rows, count)
        return [part[:, : _WORD.itemsize].view(_WORD)[:, 0] for part in parts]

    def _draw(self, s: SequenceSlice) -> SampledToken:
        length = s.start + len(s.tokens)
        last_of_blocks = np.append(np.arange(self.spec.block_tokens - 1, length - 1, self.spec.block_tokens), length - 1)
        total = int(self._words(s, last_of_blocks).sum(dtype=np.uint64))
        token = (total * 2654435761 >> 16) % self.spec.shape.vocab  # Knuth's multiplicative hash
        while token in self.spec.eos_token_ids:
            token = (token + 1) % self.spec.shape.vocab
        return SampledToken(token)

    def _words(self, s: SequenceSlice, positions: Positions) -> Words:
        blocks, offsets = np.divmod(positions, self.spec.block_tokens)
        words: Words = self._attached().words[np.asarray(s.pages)[blocks], offsets]
        return words

    def _put(self, s: SequenceSlice, words: Words) -> None:
        """Write the new tokens' words to their pages."""
        blocks, offsets = np.divmod(_positions(s), self.spec.block_tokens)
        self._attached().words[np.asarray(s.pages)[blocks], offsets] = words

    def _attached(self) -> _Arena:
        if self._arena is None:
            raise RuntimeError("step: expected an open engine with an arena attached")
        return self._arena


@dataclass(frozen=True, slots=True)
class _Arena:
    """An attached arena; `words` [slots, block_tokens] is what of it is KV."""

    words: Words
    landing: Landing
    stream: Stream


def _positions(s: SequenceSlice) -> Positions:
    """Of the new tokens."""
    return np.arange(s.start, s.start + len(s.tokens), dtype=np.int64)


def _is_decode(s: SequenceSlice) -> bool:
    """A lone token after which none is drawn, or that has a stage, is a very short chunk of a prompt."""
    return len(s.tokens) == 1 and s.start > 0 and s.sampling is not None and s.stage is None
