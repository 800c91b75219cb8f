"""One step's batch as the kernels see it: which new tokens, of which sequences, over which blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """S sequences with T new tokens in all, prefill chunks and single decode tokens in any order.

    All tensors are int32 and views of one buffer, `ints`, in the order of the fields below:

        query_start  [S+1]  new tokens of sequence s are rows query_start[s] .. query_start[s+1] - 1
        table_start  [S+1]  its blocks are block_table[table_start[s] : table_start[s+1]]
        context_len  [S]    its length after this step, cached and new tokens together
        positions    [T]    place of each new token in its sequence, from 0
        slot_of_token, offset_of_token [T]   where its K and V go in the arena
        block_table  [B]    slot ids, one per block, all sequences one after another

    `query_lens`, `context_lens` and `table_lens` are the same facts on the host, for code that may not wait for a device.
    """

    ints: Tensor
    query_start: Tensor
    table_start: Tensor
    context_len: Tensor
    positions: Tensor
    slot_of_token: Tensor
    offset_of_token: Tensor
    block_table: Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    table_lens: tuple[int, ...]

    @property
    def num_seqs(self) -> int:
        """S."""
        return len(self.query_lens)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.positions.shape[0]

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        *,
        block_tables: Sequence[Sequence[int]],
        block_tokens: int,
        device: torch.device | str = "cpu",
    ) -> "BatchLayout":
        """Lay out sequences with `query_lens` new tokens, `context_lens` tokens in all after them, and these blocks.

        A block table may be longer than its context needs. Raises ValueError where it is shorter.
        """
        num_seqs = len(query_lens)
        table_lens = tuple(len(table) for table in block_tables)
        queries = np.array(query_lens, dtype=np.int32)
        contexts = np.array(context_lens, dtype=np.int32)
        tables = np.array(table_lens, dtype=np.int32)
        if not queries.size or queries.min() < 1 or (queries > contexts).any() or (tables * block_tokens < contexts).any():
            raise ValueError(
                f"batch: expected 1 <= query <= context <= {block_tokens} * blocks for each sequence,"
                f" got {queries}, {contexts}, {tables}"
            )
        num_tokens, num_blocks = int(queries.sum()), int(tables.sum())
        sizes = (num_seqs + 1, num_seqs + 1, num_seqs, num_tokens, num_tokens, num_tokens, num_blocks)
        ints = np.zeros(sum(sizes), dtype=np.int32)
        query_start, table_start, context, positions, slots, offsets, table = np.split(ints, np.cumsum(sizes)[:-1])
        queries.cumsum(out=query_start[1:])
        tables.cumsum(out=table_start[1:])
        context[:] = contexts
        table[:] = np.fromiter(chain.from_iterable(block_tables), np.int32, num_blocks)
        first_block, shift = table_start[:-1], contexts - query_start[1:]
        if num_tokens > num_seqs:
            first_block, shift = first_block.repeat(queries), shift.repeat(queries)
        np.add(np.arange(num_tokens, dtype=np.int32), shift, out=positions)
        block, offsets[:] = np.divmod(positions, block_tokens)
        slots[:] = table[first_block + block]
        whole = torch.from_numpy(ints).to(device)
        parts = torch.split(whole, list(sizes))
        return cls(
            whole,
            query_start=parts[0],
            table_start=parts[1],
            context_len=parts[2],
            positions=parts[3],
            slot_of_token=parts[4],
            offset_of_token=parts[5],
            block_table=parts[6],
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            table_lens=table_lens,
        )
