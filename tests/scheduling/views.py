"""Columns for tests of policies."""

from collections.abc import Sequence

import numpy as np

from kvasir.scheduling.view import DecodeColumns, Ints, Lengths


def lengths(tokens: Sequence[int]) -> Lengths:
    values = sorted(set(tokens))
    return Lengths(tuple(values), np.array([values.index(value) for value in tokens], dtype=np.int64))


def decode_columns(*rows: tuple[str, int, int, int]) -> DecodeColumns:
    """(id, batch, context tokens, free KV tokens) on one node each, room for 8; all of them decode already."""

    def column(*values: int) -> Ints:
        return np.array(values, dtype=np.int64)

    ids = tuple(name for name, _, _, _ in rows)
    batch = column(*(batch for _, batch, _, _ in rows))
    context = column(*(context for _, _, context, _ in rows))
    free = column(*(free for _, _, _, free in rows))
    return DecodeColumns(
        ids=ids,
        batch=batch,
        context_tokens=context,
        free_kv_tokens=free,
        max_batch=column(*(8 for _ in rows)),
        taken_batch=batch,
        taken_context=context,
        kv_tokens=free + context,
        taken_kv=context,
        can_prefill=np.zeros(len(rows), dtype=np.bool_),
        queued=np.zeros(len(rows), dtype=np.int64),
        stays=lambda columns: np.full(len(columns), 10.0),
    )
