"""How much prefill fits into one step: a budget in tokens and, beside decoding sequences, in predicted seconds."""

from __future__ import annotations

from dataclasses import dataclass

from mypy_extensions import mypyc_attr

from kvasir.core.errors import ConfigError
from kvasir.costs.quick import QuickCosts


@dataclass(frozen=True, slots=True)
class BatcherConfig:
    """What one instance may do in a step, and how many pages it keeps at hand.

    `max_step_tokens` bounds a step's tokens, `max_mixed_tokens` those of its prefill while other sequences decode. A step that
    has `pack_tokens` of prefill takes no further prompt: the machine is full, and the first would wait for the others.
    `max_step_s` (with a cost model) the predicted time of such a mixed step, of which prefill gets at least
    `min_chunk_tokens`, so that neither phase starves; with 0 of them, prefill gets only what decode leaves of the time.
    A step of decode tokens alone may say that it be made up to `max_repeats` times. Pages are asked for `ahead_tokens` of
    growth before they are needed, and `stash_pages` may be kept unused. A sequence that gets no page for `starve_s` is
    given up.
    """

    block_tokens: int = 64
    max_batch: int = 64
    max_step_tokens: int = 2048
    pack_tokens: int = 1 << 30
    max_mixed_tokens: int = 512
    max_step_s: float | None = None
    min_chunk_tokens: int = 32
    ahead_tokens: int = 16
    stash_pages: int = 32
    starve_s: float = 10.0
    max_repeats: int = 1

    def __post_init__(self) -> None:
        for name, value, least in (
            ("block_tokens", self.block_tokens, 1),
            ("max_batch", self.max_batch, 1),
            ("max_step_tokens", self.max_step_tokens, self.max_batch + 1),  # a full batch leaves room for prefill
            ("max_mixed_tokens", self.max_mixed_tokens, 1),
            ("pack_tokens", self.pack_tokens, 1),
            ("min_chunk_tokens", self.min_chunk_tokens, 0),
            ("ahead_tokens", self.ahead_tokens, 1),
            ("stash_pages", self.stash_pages, 0),
            ("max_repeats", self.max_repeats, 1),
        ):
            if value < least:
                raise ConfigError(f"{name}: got {value}, expected at least {least}")


@mypyc_attr(acyclic=True)
class ChunkBudget:
    """The prefill that one step can still take."""

    __slots__ = ("_costs", "_floor", "_share", "_spare_s", "_unpacked", "tokens")

    def __init__(self, config: BatcherConfig, costs: QuickCosts | None, *, batch: int, context_tokens: int, share: float = 1.0):
        """`batch` sequences with `context_tokens` in all decode in the same step.

        Below 1, `share` is that of a pipeline whose next chunk is on its way here: others' chunks are as much shorter, so
        that no turn of the pipeline waits for longer than one of its own takes.
        """
        room = config.max_step_tokens - batch
        self.tokens = min(room, config.max_mixed_tokens) if batch else room
        self._share = share
        self._unpacked = config.pack_tokens
        self._floor = min(config.min_chunk_tokens, self.tokens)
        self._costs = costs if batch and config.max_step_s is not None else None
        self._spare_s = 0.0
        if self._costs is not None and config.max_step_s is not None:
            self._spare_s = config.max_step_s - self._costs.decode_step_s(batch, context_tokens)

    def chunk(self, remaining: int, cached_tokens: int, share: float = 1.0) -> int:
        """The most of `remaining` prompt tokens that the step can take, each in a `share` of the layers; 0 when it is full."""
        if self._unpacked <= 0:
            return 0
        most = min(remaining, int(self.tokens * min(1.0, self._share / share)))
        costs = self._costs
        if costs is None or most <= self._floor or share * costs.prefill_s(most, cached_tokens) <= self._spare_s:
            return most
        low, high = self._floor, most - 1  # the most tokens within the spare seconds, but the floor in any case
        while low < high:
            middle = (low + high + 1) // 2
            if share * costs.prefill_s(middle, cached_tokens) <= self._spare_s:
                low = middle
            else:
                high = middle - 1
        return low

    def spend(self, length: int, cached_tokens: int, share: float = 1.0) -> None:
        self.tokens -= length
        self._unpacked -= length
        self._floor = min(max(0, self._floor - length), self.tokens)
        if self._costs is not None:
            self._spare_s -= share * self._costs.prefill_s(length, cached_tokens)
