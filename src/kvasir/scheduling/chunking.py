"""How much prefill fits into one step: a budget in tokens and, beside decoding sequences, in predicted seconds."""

from __future__ import annotations

from dataclasses import dataclass

from kvasir.core.errors import ConfigError
from kvasir.costs.model import CostModel


@dataclass(frozen=True, slots=True)
class BatcherConfig:
    """What one instance may do in a step, and how many pages it keeps at hand.

    `max_step_tokens` bounds a step's tokens; `max_mixed_tokens` those of its prefill while other sequences decode;
    `max_step_s` (with a cost model) the predicted time of such a mixed step, of which prefill gets at least
    `min_chunk_tokens`, so that neither phase starves. Pages are asked for `ahead_tokens` of growth before they are
    needed, and `stash_pages` may be kept unused. A sequence that gets no page for `starve_s` is given up.
    """

    block_tokens: int = 64
    max_batch: int = 64
    max_step_tokens: int = 2048
    max_mixed_tokens: int = 512
    max_step_s: float | None = None
    min_chunk_tokens: int = 32
    ahead_tokens: int = 16
    stash_pages: int = 32
    starve_s: float = 10.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("block_tokens", self.block_tokens, 1),
            ("max_batch", self.max_batch, 1),
            ("max_step_tokens", self.max_step_tokens, self.max_batch + 1),  # a full batch leaves room for prefill
            ("max_mixed_tokens", self.max_mixed_tokens, 1),
            ("min_chunk_tokens", self.min_chunk_tokens, 1),
            ("ahead_tokens", self.ahead_tokens, 1),
            ("stash_pages", self.stash_pages, 0),
        ):
            if value < least:
                raise ConfigError(f"{name}: got {value}, expected at least {least}")


class ChunkBudget:
    """The prefill that one step can still take."""

    __slots__ = ("_costs", "_floor", "_spare_s", "tokens")

    def __init__(self, config: BatcherConfig, costs: CostModel | None, *, batch: int, context_tokens: int):
        """`batch` sequences with `context_tokens` in all decode in the same step."""
        room = config.max_step_tokens - batch
        self.tokens = min(room, config.max_mixed_tokens) if batch else room
        self._floor = min(config.min_chunk_tokens, self.tokens)
        self._costs = costs if batch and config.max_step_s is not None else None
        self._spare_s = 0.0
        if self._costs is not None and config.max_step_s is not None:
            self._spare_s = config.max_step_s - self._costs.decode_step_s(batch, context_tokens)

    def chunk(self, remaining: int, cached_tokens: int) -> int:
        """The most of `remaining` prompt tokens that the step can take; 0 when it is full."""
        most = min(remaining, self.tokens)
        if self._costs is None or most <= self._floor:
            return most
        low, high = self._floor, most  # the most tokens within the spare seconds, but the floor in any case
        while low < high:
            middle = (low + high + 1) // 2
            if self._costs.prefill_s(middle, cached_tokens) <= self._spare_s:
                low = middle
            else:
                high = middle - 1
        return low

    def spend(self, length: int, cached_tokens: int) -> None:
        self.tokens -= length
        self._floor = min(max(0, self._floor - length), self.tokens)
        if self._costs is not None:
            self._spare_s -= self._costs.prefill_s(length, cached_tokens)
