"""What placement reads of every instance, kept in columns: a decision among a thousand is then some fifty array operations.

Tables write a row when something has changed there, through a `memoryview` of each column, which takes half of the time.
The columns that they give out are their own, not copies: valid until the next is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from kvasir.core.errors import InvariantError
from kvasir.pool.match import PrefixMatch, Runs, bits_of
from kvasir.scheduling.instance import Instance
from kvasir.scheduling.view import Bools, DecodeColumns, Floats, Ints, Lengths, PrefillColumns, Stays

FEW_NODES: Final = 16
"""Up to so many nodes of a run are looked up one by one; a mask of a thousand becomes an array in the time of twenty."""


class Table:
    """Some instances, one row each, and whose rows are out of date. `reserved`, by node: KV tokens that are spoken for."""

    __slots__ = ("_ids", "_reserved", "_rows", "_stale_books", "_stale_seats")

    def __init__(self, instances: list[Instance], reserved: Mapping[str, int]) -> None:
        self._ids = tuple([known.id for known in instances])
        self._rows = {name: row for row, name in enumerate(self._ids)}
        self._reserved = reserved
        self._stale_books = {known.id: known for known in instances}
        self._stale_seats = dict(self._stale_books)

    def booked(self, known: Instance) -> None:
        """Its queue or its pace has changed."""
        if known.id in self._rows:
            self._stale_books[known.id] = known

    def seated(self, on_node: list[Instance]) -> None:
        """Of one of these instances, which share KV memory, the seats have changed."""
        for known in on_node:
            if known.id in self._rows:
                self._stale_seats[known.id] = known

    def refresh(self) -> None:
        for name, known in self._stale_books.items():
            self._write_book(self._rows[name], known)
        self._stale_books.clear()
        for name, known in self._stale_seats.items():
            self._write_seats(self._rows[name], known, known.max_kv_tokens - self._reserved.get(known.info.node, 0))
        self._stale_seats.clear()

    def _write_book(self, row: int, known: Instance) -> None:
        raise NotImplementedError

    def _write_seats(self, row: int, known: Instance, free_kv_tokens: int) -> None:
        raise NotImplementedError


class PrefillTable(Table):
    """The instances that can prefill. `_last_rank`: of the prefill that goes last, -inf where there is none.

    Of each node, by the bit that it has in a match's masks, `_rows_of` are its rows; `_bits` has the bit of each row's node, or
    one more than there are for those that are `_unheard` of.
    """

    __slots__ = (
        "_as_of_s",
        "_batch",
        "_bits",
        "_books",
        "_can_decode",
        "_done_s",
        "_instances",
        "_kv_used",
        "_last_rank",
        "_latest_rank",
        "_most_s",
        "_nodes",
        "_pace",
        "_pending_s",
        "_queued",
        "_queued_tokens",
        "_rows_of",
        "_seats",
        "_unheard",
    )

    def __init__(self, instances: list[Instance], reserved: Mapping[str, int]) -> None:
        super().__init__(instances, reserved)
        count = len(instances)
        self._instances = instances
        self._nodes: tuple[str | None, ...] | None = None
        self._bits: Ints = np.zeros(0, dtype=np.int64)
        self._unheard: Ints = np.zeros(0, dtype=np.int64)
        self._rows_of: list[list[int]] = []
        self._pending_s: Floats = np.zeros(count)
        self._done_s: Floats = np.zeros(count)
        self._as_of_s: Floats = np.zeros(count)
        self._most_s: Floats = np.zeros(count)
        self._pace: Floats = np.ones(count)
        self._last_rank: Floats = np.full(count, -math.inf)
        self._latest_rank = -math.inf
        self._queued: Ints = np.zeros(count, dtype=np.int64)
        self._queued_tokens: Ints = np.zeros(count, dtype=np.int64)
        self._batch: Ints = np.zeros(count, dtype=np.int64)
        self._kv_used: Floats = np.zeros(count)
        self._can_decode: Bools = np.array([known.can_decode for known in instances], dtype=np.bool_)
        book = [self._pending_s, self._done_s, self._as_of_s, self._most_s, self._pace]
        self._books = _writers([*book, self._last_rank, self._queued, self._queued_tokens])
        self._seats = _writers([self._batch, self._kv_used])

    def _write_book(self, row: int, known: Instance) -> None:
        book = known.book
        pending_s, done_s, as_of_s, most_s, pace = book.columns
        last_rank = book.last_rank
        self._latest_rank = max(self._latest_rank, last_rank)
        _put_row(self._books, row, (pending_s, done_s, as_of_s, most_s, pace, last_rank, len(book), book.tokens))

    def _write_seats(self, row: int, known: Instance, free_kv_tokens: int) -> None:
        _put_row(self._seats, row, (len(known.seats), 1.0 - free_kv_tokens / max(1, known.max_kv_tokens)))

    def columns(self, match: PrefixMatch, block_tokens: int, now: float, rank: float) -> PrefillColumns:
        """For a prompt with this match, that would queue at `rank`."""
        self.refresh()
        prefix = deep = self._lengths(match, match.runs, block_tokens)
        if match.runs_any != match.runs:
            deep = self._lengths(match, match.runs_any, block_tokens)
        return PrefillColumns(
            ids=self._ids,
            wait_s=self._wait_s(now, rank),
            pace=self._pace,
            prefix=prefix,
            deep=deep,
            queued=self._queued,
            queued_tokens=self._queued_tokens,
            batch=self._batch,
            kv_used=self._kv_used,
            can_decode=self._can_decode,
        )

    def check_as(self, other: PrefillTable) -> None:
        """Raises InvariantError unless `other`, which was just made, says the same."""
        self.refresh()
        other.refresh()
        _check_same("waits", [self._pending_s, self._done_s, self._as_of_s], [other._pending_s, other._done_s, other._as_of_s])
        _check_same("paces", [self._most_s, self._pace], [other._most_s, other._pace])
        _check_same("ranks", [self._last_rank], [other._last_rank])
        _check_same("queues", [self._queued, self._queued_tokens], [other._queued, other._queued_tokens])
        _check_same("batches", [self._batch, self._kv_used], [other._batch, other._kv_used])

    def _wait_s(self, now: float, rank: float) -> Floats:
        """See PrefillBook.wait_s for the formula. All that was sent goes first but what has a later rank."""
        worked_s: Floats = now - self._as_of_s
        np.maximum(worked_s, 0.0, out=worked_s)
        worked_s *= self._pace
        worked_s += self._done_s
        np.minimum(worked_s, self._most_s, out=worked_s)
        wait_s: Floats = self._pending_s - worked_s
        wait_s /= self._pace
        if rank < self._latest_rank:
            for row in np.flatnonzero(self._last_rank > rank).tolist():
                wait_s[row] = self._instances[row].book.wait_s(now, rank)
        return wait_s

    def _lengths(self, match: PrefixMatch, runs: Runs, block_tokens: int) -> Lengths:
        """Per row, the length of its node's run in tokens. Of no run are the nodes left over; most are of one."""
        self._see(match)
        others = (1 << len(match.nodes)) - 1
        for mask, _ in runs:
            others &= ~mask
        masks = [others, *[mask for mask, _ in runs]]
        sizes = [mask.bit_count() for mask in masks]
        common = sizes.index(max(sizes))
        which: Ints = np.full(len(self._instances), common, dtype=np.int64)
        for number, mask in enumerate(masks):
            if number != common and mask:
                self._write(which, mask, number)
        if common:
            which[self._unheard] = 0
        return Lengths((0, *[count * block_tokens for _, count in runs]), which)

    def _write(self, which: Ints, mask: int, number: int) -> None:
        """Into the rows of these nodes; a mask of very many becomes an array as a whole."""
        if mask.bit_count() <= FEW_NODES:
            for bit in bits_of(mask):
                for row in self._rows_of[bit]:
                    which[row] = number
            return
        num_bits = len(self._rows_of)
        octets = np.frombuffer(mask.to_bytes(-(-num_bits // 8), "little"), dtype=np.uint8)
        is_there = np.zeros(num_bits + 1, dtype=np.bool_)
        is_there[:-1] = np.unpackbits(octets, count=num_bits, bitorder="little")
        which[is_there[self._bits]] = number

    def _see(self, match: PrefixMatch) -> None:
        """Find the rows of each node, by its bit in a match's masks; its `nodes` change only as a whole."""
        nodes = match.nodes
        if nodes is self._nodes:
            return
        self._nodes = nodes
        self._rows_of = match.rows_on([known.info.node for known in self._instances])
        self._bits = np.full(len(self._instances), len(nodes), dtype=np.int64)
        for bit, rows in enumerate(self._rows_of):
            self._bits[rows] = bit
        self._unheard = np.flatnonzero(self._bits == len(nodes))


class DecodeTable(Table):
    """The instances that can decode."""

    __slots__ = (
        "_batch",
        "_can_prefill",
        "_context_tokens",
        "_free_kv_tokens",
        "_kv_tokens",
        "_max_batch",
        "_mixed",
        "_parts",
        "_queued",
        "_seats",
        "_shares",
        "_taken_batch",
        "_taken_context",
        "_taken_kv",
    )

    def __init__(self, instances: list[Instance], reserved: Mapping[str, int]) -> None:
        super().__init__(instances, reserved)
        count = len(instances)
        self._queued: Ints = np.zeros(count, dtype=np.int64)
        self._batch: Ints = np.zeros(count, dtype=np.int64)
        self._context_tokens: Ints = np.zeros(count, dtype=np.int64)
        self._free_kv_tokens: Ints = np.zeros(count, dtype=np.int64)
        self._taken_batch: Ints = np.zeros(count, dtype=np.int64)
        self._taken_context: Ints = np.zeros(count, dtype=np.int64)
        self._taken_kv: Ints = np.zeros(count, dtype=np.int64)
        self._parts: Floats = np.zeros((2, count))  # context tokens of those who decode, and of those who come
        self._shares: Floats = np.zeros((2, 1))
        self._mixed: Floats = np.zeros((2, count))
        self._kv_tokens: Ints = np.array([known.max_kv_tokens for known in instances], dtype=np.int64)
        self._max_batch: Ints = np.array([known.max_batch for known in instances], dtype=np.int64)
        self._can_prefill: Bools = np.array([known.can_prefill for known in instances], dtype=np.bool_)
        seats = [
            self._batch,
            self._context_tokens,
            self._free_kv_tokens,
            self._taken_batch,
            self._taken_context,
            self._taken_kv,
        ]
        self._seats = _writers([*seats, *self._parts])

    def _write_book(self, row: int, known: Instance) -> None:
        self._queued[row] = len(known.book)

    def _write_seats(self, row: int, known: Instance, free_kv_tokens: int) -> None:
        taken, batch, context_tokens = known.taken, len(known.seats), known.context_tokens
        counts = (batch, context_tokens, free_kv_tokens, taken.batch, taken.context_tokens, taken.kv_tokens)
        _put_row(self._seats, row, (*counts, taken.context_tokens, context_tokens - taken.context_tokens))

    def columns(self, stays: Stays) -> DecodeColumns:
        self.refresh()
        return DecodeColumns(
            ids=self._ids,
            batch=self._batch,
            context_tokens=self._context_tokens,
            free_kv_tokens=self._free_kv_tokens,
            max_batch=self._max_batch,
            taken_batch=self._taken_batch,
            taken_context=self._taken_context,
            kv_tokens=self._kv_tokens,
            taken_kv=self._taken_kv,
            can_prefill=self._can_prefill,
            queued=self._queued,
            stays=stays,
        )

    def context_tokens_of(self, stayed: float, came: float) -> Floats:
        """By row, the context tokens of so much of those who decode now and so much of those who are in prefill.

        Whole numbers, but floats: no operation has to convert them.
        """
        self.refresh()
        self._shares[0], self._shares[1] = stayed, came
        mixed = np.multiply(self._parts, self._shares, out=self._mixed)
        total: Floats = mixed[0]
        total += mixed[1]
        return np.floor(total, out=total)

    @property
    def can_prefill(self) -> Bools:
        return self._can_prefill

    def check_as(self, other: DecodeTable) -> None:
        """Raises InvariantError unless `other`, which was just made, says the same."""
        self.refresh()
        other.refresh()
        _check_same("batches", [self._batch, self._context_tokens], [other._batch, other._context_tokens])
        _check_same("free KV", [self._free_kv_tokens, self._queued], [other._free_kv_tokens, other._queued])
        _check_same(
            "taken seats",
            [self._taken_batch, self._taken_context, self._taken_kv],
            [other._taken_batch, other._taken_context, other._taken_kv],
        )
        _check_same("those who decode and those who come", [self._parts], [other._parts])


def _writers(columns: Sequence[Floats | Ints]) -> list[memoryview[Any]]:
    return [column.data for column in columns]


def _put_row(columns: list[memoryview[Any]], row: int, numbers: tuple[Any, ...]) -> None:
    """`Any` keeps whole numbers whole in machine code, for columns of such."""
    for place, column in enumerate(columns):
        column[row] = numbers[place]


def _check_same(name: str, own: Sequence[Floats | Ints], others: Sequence[Floats | Ints]) -> None:
    for mine, other in zip(own, others, strict=True):
        if not np.array_equal(mine, other):
            raise InvariantError(f"columns of {name} say {mine.tolist()}, instances {other.tolist()}")
