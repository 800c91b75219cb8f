"""The seam between what decides and what computes: an engine runs one step over sequences whose KV lies in arena slots.

On a CPU the engine's pages *are* arena slots: a cached prefix, a handed-off prompt and a block that decode wrote are read
where they lie. An engine with memory of its own (CUDA) loads and stores slots layer by layer behind the same call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from kvasir.core.keys import BlockKey, root_key
from kvasir.core.request import Sampling
from kvasir.costs.shape import ModelShape


class ModelSpec(Struct, frozen=True):
    """What the rest of the house must know of a model; read from the checkpoint without torch.

    `identity` hashes the configuration and the weight files' names, sizes and headers (enters the block keys with `dtype`
    and `layout`). `max_model_len` bounds prompt plus output, in tokens.
    """

    name: str
    path: str
    identity: str
    architecture: str
    shape: ModelShape
    dtype: str
    layout: str
    block_tokens: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]

    @property
    def kv_identity(self) -> str:
        """What makes a block's bytes what they are, besides its tokens."""
        return f"{self.identity}/{self.dtype}/{self.layout}/{self.block_tokens}"

    @property
    def slot_bytes(self) -> int:
        """Bytes of one block's KV in all layers."""
        return self.block_tokens * self.shape.kv_bytes_per_token

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's residual stream: `hidden` numbers."""
        return self.shape.hidden * self.shape.dtype_bytes

    @property
    def rows_per_slot(self) -> int:
        """Of the residual stream, what goes into one slot."""
        return self.slot_bytes // self.row_bytes

    def root_key(self, salt: str) -> BlockKey:
        """The parent of the first block of a prompt: what KV depends on beside the tokens."""
        return root_key(model=self.identity, dtype=self.dtype, layout=self.layout, block_tokens=self.block_tokens, salt=salt)


@dataclass(frozen=True, slots=True)
class Slots:
    """The arena as an engine sees it: slot i is `memory[i * stride : i * stride + spec.slot_bytes]`.

    `memory` is writable uint8, shared between the processes of the node. `generations[i]` (uint32) grows each time slot i is
    reserved anew, so that a copy of a slot elsewhere can be told to be stale. `missing[i]` (uint32) layers of slot i are still
    on their way (see engine/landing.py).
    """

    memory: npt.NDArray[np.uint8]
    stride: int
    generations: npt.NDArray[np.uint32]
    missing: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class StreamRows:
    """Where the residual stream of a slice's tokens passes from one stage to the next: a row of `spec.row_bytes` a token.

    Each of `slots` holds `spec.rows_per_slot` rows, one after another; the slice's first token is row `first` of them all.
    """

    slots: Sequence[int]
    first: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What of the model is computed for a slice in a chunked pipeline (FAST'25, section 3.3): layers [first, last).

    The first stage embeds its tokens, any other `reads` what the stage before wrote. All but the last, which may draw a
    token, write the residual stream after their layers to `writes`.
    """

    first: int
    last: int
    reads: StreamRows | None
    writes: StreamRows | None


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """New tokens of one sequence: positions [start, start + len(tokens)); `pages[j]` is the slot of block j.

    The KV of positions below `start` is in place. With `sampling`, the token after the last one is drawn. With a `stage`, only
    its layers are computed, and of the KV only theirs is read and written.
    """

    request_id: str
    tokens: Sequence[int] | npt.NDArray[np.uint32]
    start: int
    pages: Sequence[int]
    sampling: Sampling | None
    stage: Stage | None = None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """`top` are the most likely tokens with their logprobs, most likely first; empty unless asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """The drawn token of each slice that asked for one, and the seconds that the step took."""

    tokens: dict[str, SampledToken]
    seconds: float


class Engine(Protocol):
    """One model in one process. `step` calls never overlap. After `close` nothing may be called."""

    @property
    def spec(self) -> ModelSpec: ...

    def attach(self, slots: Slots) -> None:
        """Use this arena for KV from now on; called once, before the first step."""
        ...

    async def step(self, slices: Sequence[SequenceSlice]) -> StepResult:
        """Compute the slices, write their KV to their pages, sample where asked.

        That is one forward pass, and one more for each slice with a stage.
        Raises KvLost when cached blocks of some slices never come; the others can be computed again without those.
        """
        ...

    async def close(self) -> None: ...
