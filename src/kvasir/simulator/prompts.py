"""Block keys of a trace's prompts. A hash id names a block with everything before it, so it is the key, padded to 16 bytes."""

from __future__ import annotations

from struct import Struct
from typing import Final

from kvasir.core.errors import ConfigError
from kvasir.core.keys import KEY_BYTES, BlockKey
from kvasir.workload.trace import TraceRequest

_PART_SHIFT: Final = 64
_OUTPUT_BIT = 1 << 127


class PromptKeys:
    """Keys of blocks of `block_tokens` tokens, from hash ids that name `trace_tokens` each.

    Smaller blocks are numbered within their hash id; a larger block is named by the last hash id in it. Keys are made when a
    request arrives and forgotten with it, so that a long trace costs no memory. Raises ConfigError when neither size is
    a multiple of the other.
    """

    __slots__ = ("_block_tokens", "_forms", "_merge", "_split")

    def __init__(self, trace_tokens: int, block_tokens: int):
        if trace_tokens % block_tokens and block_tokens % trace_tokens:
            raise ConfigError(
                f"block_tokens: got {block_tokens}, expected a multiple or divisor of the trace's {trace_tokens} tokens a block"
            )
        self._block_tokens = block_tokens
        self._split = max(1, trace_tokens // block_tokens)
        self._merge = max(1, block_tokens // trace_tokens)
        self._forms: dict[int, tuple[Struct, Struct]] = {}  # by number of keys: ids, padded, and keys

    def of(self, request: TraceRequest) -> tuple[BlockKey, ...]:
        """Keys of the full blocks of the prompt."""
        count, ids = request.input_tokens // self._block_tokens, request.hash_ids
        if self._split > 1:
            parts = [(ids[i // self._split], i % self._split) for i in range(count)]
            return tuple([(part << _PART_SHIFT | hash_id).to_bytes(KEY_BYTES, "little") for hash_id, part in parts])
        if self._merge > 1:
            ids = ids[self._merge - 1 :: self._merge]
        return self._padded(ids if count == len(ids) else ids[:count])

    def _padded(self, ids: tuple[int, ...]) -> tuple[BlockKey, ...]:
        """All at once, which takes half as long as one by one."""
        count = len(ids)
        forms = self._forms.get(count)
        if forms is None:
            forms = self._forms[count] = Struct("<" + f"Q{KEY_BYTES - 8}x" * count), Struct(f"{KEY_BYTES}s" * count)
        return forms[1].unpack(forms[0].pack(*ids))


def output_key(number: int, index: int) -> BlockKey:
    """The key of block `index` of request `number`, with output in it: nobody else's, for a trace does not say what it was."""
    return (_OUTPUT_BIT | number << 32 | index).to_bytes(KEY_BYTES, "little")
