"""Steps whose tokens mean nothing, to see how long an engine takes. Their pages hold whatever they hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvasir.core.request import Sampling
from kvasir.engine.interface import ModelSpec, SequenceSlice

_GREEDY = Sampling(temperature=0.0)


def prefill_step(spec: ModelSpec, pages: Sequence[int], new_tokens: int, cached_tokens: int = 0) -> list[SequenceSlice]:
    """A prompt of `new_tokens` on `cached_tokens`, on the first of the `pages`."""
    tokens = np.arange(new_tokens, dtype=np.uint32) % spec.shape.vocab
    used = pages[: -(-(new_tokens + cached_tokens) // spec.block_tokens)]
    return [SequenceSlice("prefill", tokens, cached_tokens, used, _GREEDY)]


def decode_step(spec: ModelSpec, pages: Sequence[int], batch: int, context_tokens: int) -> list[SequenceSlice]:
    """`batch` sequences of `context_tokens` each, on pages of their own."""
    each = -(-context_tokens // spec.block_tokens)
    return [
        SequenceSlice(f"decode-{i}", [i + 1], context_tokens - 1, pages[i * each : (i + 1) * each], _GREEDY)
        for i in range(batch)
    ]
