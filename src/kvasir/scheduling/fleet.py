"""The instances that the conductor knows, and what it has given each of them to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from msgspec import structs

from kvasir.core.errors import InvariantError
from kvasir.core.events import InstanceInfo, InstanceLoad
from kvasir.costs.model import CostModel
from kvasir.costs.quick import quick
from kvasir.pool.match import PrefixMatch, Runs
from kvasir.scheduling.book import PrefillBook
from kvasir.scheduling.plan import Outlook
from kvasir.scheduling.view import Bools, DecodeColumns, Floats, Ints, PrefillColumns

LEAST_PACE: Final = 0.02
"""An instance whose decode steps leave no slack still prefills a little: a prediction must stay finite."""

ANY_S: Final = math.inf
"""Seconds to spare where nobody is put off."""

ROUNDS: Final = 6
"""The longer steps take, the more answers are under way at a time, and so on: each round halves the error, or better."""


class Seat:
    """A place in a decode batch: context that will be read each step, KV that will be held, and from when to when.

    `is_taken`: the request decodes; until then `joins_s` is when its prefill is predicted to be done.
    """

    __slots__ = ("context_tokens", "is_taken", "joins_s", "kv_tokens", "leaves_s", "stays_s")

    def __init__(self, context_tokens: int, kv_tokens: int, joins_s: float, stays_s: float):
        self.context_tokens = context_tokens
        self.kv_tokens = kv_tokens
        self.joins_s = joins_s
        self.stays_s = stays_s
        self.leaves_s = joins_s + stays_s
        self.is_taken = False

    def join(self, now: float) -> None:
        self.joins_s, self.leaves_s, self.is_taken = now, now + self.stays_s, True


class Taken:
    """Those of an instance's seats whose requests decode now."""

    __slots__ = ("batch", "context_tokens", "kv_tokens")

    def __init__(self, batch: int = 0, context_tokens: int = 0, kv_tokens: int = 0):
        self.batch = batch
        self.context_tokens = context_tokens
        self.kv_tokens = kv_tokens

    def add(self, seat: Seat, sign: int = 1) -> None:
        self.batch += sign
        self.context_tokens += sign * seat.context_tokens
        self.kv_tokens += sign * seat.kv_tokens


@dataclass(slots=True)
class Instance:
    """One instance: its own account in `load`, the conductor's in `book` (prefills) and `seats` (decodes)."""

    info: InstanceInfo
    row: int = 0
    load: InstanceLoad = field(default_factory=InstanceLoad)
    heartbeat_s: float | None = None
    book: PrefillBook = field(default_factory=PrefillBook)
    seats: dict[str, Seat] = field(default_factory=dict)
    context_tokens: int = 0
    kv_tokens: int = 0
    taken: Taken = field(default_factory=Taken)
    id: str = ""
    node: str = ""
    max_batch: int = 0
    max_kv_tokens: int = 0
    can_prefill: bool = False
    can_decode: bool = False

    def __post_init__(self) -> None:
        self.introduce(self.info)

    def introduce(self, info: InstanceInfo) -> None:
        """It is this now. What is asked for in each decision is at hand without a look into `info`."""
        self.info = info
        self.id, self.node, self.max_batch, self.max_kv_tokens = info.id, info.node, info.max_batch, info.kv_tokens
        self.can_prefill, self.can_decode = info.role.can_prefill, info.role.can_decode


class Fleet:
    """All living instances, in order of their ids; KV is reserved per node, whose arena its instances share.

    What placement reads of every instance is kept in columns, one row an instance, so that a decision among a thousand is
    a few array operations. With `mixed_step_s`, the longest step that an instance may take while it decodes, prefill on it
    is predicted to run in what decode leaves of that.
    """

    def __init__(self, costs: CostModel, mixed_step_s: float | None = None) -> None:
        self._costs = quick(costs)
        self._token_s = self._costs.prefill_s(1, 0)
        self._fixed_s = self._costs.decode_step_s(1, 0)
        self._mixed_step_s = mixed_step_s
        self._by_id: dict[str, Instance] = {}
        self._rows: list[Instance] = []
        self._reserved: dict[str, int] = {}
        self._latest_rank = -math.inf
        self._masks_nodes: tuple[str | None, ...] | None = None  # for which `_masks` are: those of the prefillers' nodes
        self._masks: list[int] = []
        self.answer_tokens = math.inf
        """Tokens of an answer, on average; the Placer learns it."""
        self.ttft_s = 0.0
        """What the Placer predicted for the last requests, on average."""
        self._index()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, instance: str) -> bool:
        return instance in self._by_id

    def __getitem__(self, instance: str) -> Instance:
        return self._by_id[instance]

    def get(self, instance: str | None) -> Instance | None:
        return self._by_id.get(instance) if instance is not None else None

    @property
    def instances(self) -> tuple[Instance, ...]:
        return tuple(self._rows)

    @property
    def prefillers(self) -> list[Instance]:
        """In order of their ids; to be read only."""
        return self._prefillers

    @property
    def decoders(self) -> list[Instance]:
        return self._decoders

    @property
    def missing_role(self) -> str | None:
        """`prefill` or `decode` when no instance can do that, None when requests can be served."""
        if not self._prefillers:
            return "prefill"
        return None if self._decoders else "decode"

    @property
    def max_kv_tokens(self) -> int:
        """The longest sequence that any decoding instance can hold."""
        return self._max_kv_tokens

    def join(self, info: InstanceInfo) -> None:
        self._by_id[info.id] = Instance(info)
        self._index()

    def update(self, info: InstanceInfo) -> None:
        """The same incarnation introduces itself again, maybe in another role; what it holds stays."""
        known = self._by_id[info.id]
        if info == known.info:
            return
        is_role_only = info == structs.replace(known.info, role=info.role)
        known.introduce(info)
        if is_role_only:
            self._index_roles()
        else:
            self._index()

    def lose(self, instance: str, now: float) -> None:
        """Forget the instance and what was booked there; unknown ids are ignored."""
        if instance not in self._by_id:
            return
        for request_id in list(self._by_id[instance].seats):
            self.leave(instance, request_id, now)
        del self._by_id[instance]
        self._index()

    # --- what placement reads ----------------------------------------------------------------------------------

    def prefill_columns(
        self, match: PrefixMatch, *, block_tokens: int, now: float, rank: float, avoid: frozenset[str]
    ) -> PrefillColumns:
        """Instances that can prefill, for a prompt that would queue at `rank`.

        Those to `avoid` are left out unless nobody else can do their work.
        """
        self._refresh()
        rows = self._without(self._prefill_rows, avoid)
        prefix_tokens = deep_tokens = self._on_nodes(match, match.runs, block_tokens)[rows]
        if match.runs_any != match.runs:
            deep_tokens = self._on_nodes(match, match.runs_any, block_tokens)[rows]
        ids = self._prefill_ids if rows is self._prefill_rows else self._ids_of(rows)
        return PrefillColumns(
            ids=ids,
            wait_s=self._wait_s(rows, now, rank),
            pace=self._book[4, rows],
            prefix_tokens=prefix_tokens,
            deep_tokens=deep_tokens,
            queued=self._queued[rows],
            queued_tokens=self._queued_tokens[rows],
            batch=self._batch[rows],
            kv_used=self._kv_used[rows],
            can_decode=self._can_decode[rows],
        )

    def decode_columns(self, avoid: frozenset[str]) -> DecodeColumns:
        """Instances that can decode, as above."""
        self._refresh()
        rows = self._without(self._decode_rows, avoid)
        ids = self._decode_ids if rows is self._decode_rows else self._ids_of(rows)
        return DecodeColumns(
            ids=ids,
            batch=self._batch[rows],
            context_tokens=self._context[rows],
            free_kv_tokens=self._free_kv[rows],
            max_batch=self._max_batch[rows],
            taken_batch=self._taken[0, rows],
            taken_context=self._taken[1, rows],
            kv_tokens=self._kv_tokens[rows],
            taken_kv=self._taken[2, rows],
            can_prefill=self._can_prefill[rows],
            stays_s=self._stays_s(rows),
        )

    def free_kv_tokens(self, instance: Instance) -> int:
        """KV of its node that is not spoken for."""
        return instance.max_kv_tokens - self._reserved.get(instance.node, 0)

    def reserved_kv_tokens(self, instance: Instance) -> int:
        """KV of its node that is spoken for."""
        return self._reserved.get(instance.node, 0)

    def blocks_at_prefillers(self, match: PrefixMatch) -> list[int]:
        """For each of `prefillers`, the length of its node's run in blocks."""
        if match.nodes is not self._masks_nodes:
            self._masks_nodes = match.nodes
            bits = {node: bit for bit, node in enumerate(match.nodes)}
            self._masks = [1 << bits[i.info.node] if i.info.node in bits else 0 for i in self._prefillers]
        blocks = [0] * len(self._masks)
        for nodes, count in match.runs:
            for row, mask in enumerate(self._masks):
                if nodes & mask:
                    blocks[row] = count
        return blocks

    def least_wait_s(self, now: float) -> float:
        """When the first prefill instance will have drained."""
        return min((i.book.wait_s(now) for i in self.prefillers), default=0.0)

    def spare_s(self, instance: str, now: float, rank: float) -> float:
        """Seconds of work that `instance` can take in at `rank` without making what comes after it late."""
        if rank >= self._latest_rank:
            return ANY_S
        return self._by_id[instance].book.spare_s(now, rank)

    def outlook(self, instance: str, at_s: float) -> Outlook:
        """Who decodes on `instance` now, and who is expected to at `at_s`: some will have left, others joined."""
        known = self._by_id[instance]
        batch_then = context_then = 0
        for seat in known.seats.values():
            if seat.joins_s <= at_s < seat.leaves_s:
                batch_then += 1
                context_then += seat.context_tokens
        return Outlook(known.taken.batch, known.taken.context_tokens, batch_then, context_then)

    def step_s(self, instance: Instance) -> float:
        """What a decode step of `instance` takes in the long run, with the prefill beside it if there is any.

        Not as it is now: whoever has a small batch just now would seem fast, and be given all that comes.
        """
        batch, context_tokens = len(instance.seats), instance.context_tokens
        least_s = self._mixed_step_s if self._mixed_step_s is not None and len(instance.book) else 0.0
        step_s = max(least_s, self._fixed_s)
        for _ in range(ROUNDS):
            share = self._decode_share(self.answer_tokens * step_s)
            batch_then, context_then = _rounded(share * batch), _rounded(share * context_tokens)
            next_s = self._costs.decode_step_s(max(1, batch_then), context_then)
            if next_s < least_s:
                next_s = least_s
            if next_s == step_s:
                break
            step_s = next_s
        return step_s

    def stays_s(self, instance: Instance) -> float:
        """How long an answer decodes on `instance`: its tokens in steps of the long run."""
        return self.answer_tokens * self.step_s(instance)

    def expected(self, instance: Instance, stays_s: float) -> Taken:
        """What `instance` decodes in the long run, where an answer stays for `stays_s`.

        Of all requests assigned to it that share decodes which an answer's stay is of its whole time here (Little's law).
        """
        share = self._decode_share(stays_s)
        return Taken(
            _rounded(share * len(instance.seats)),
            _rounded(share * instance.context_tokens),
            _rounded(share * instance.kv_tokens),
        )

    # --- what was given to whom --------------------------------------------------------------------------------

    def sent(
        self, instance: str, request_id: str, *, seconds: float, tokens: int, now: float, rank: float, due_s: float
    ) -> None:
        """A prefill of `tokens` new tokens, predicted to take `seconds` of the instance alone, is on its way."""
        known = self._by_id[instance]
        known.book.sent(request_id, seconds=seconds, tokens=tokens, now=now, rank=rank, due_s=due_s)
        self._latest_rank = max(self._latest_rank, rank)
        self._booked(known)

    def done(self, instance: str, request_id: str, now: float) -> None:
        """The prefill is over, one way or another."""
        if (known := self._by_id.get(instance)) is not None:
            known.book.left(request_id, now)
            self._booked(known)

    def reported(self, instance: str, load: InstanceLoad, *, settle_s: float, now: float) -> None:
        """The instance's own account of its queues."""
        known = self._by_id[instance]
        known.load = load
        known.heartbeat_s = now
        if len(known.book):
            known.book.reported(load.waiting_tokens, sent_before_s=now - settle_s, now=now)
            self._booked(known)

    def expire(self, *, sent_before_s: float, now: float) -> int:
        """Drop predictions that are long overdue; how many there were."""
        num_expired = 0
        for known in self._rows:
            if len(known.book) and (expired := known.book.expire(sent_before_s=sent_before_s, now=now)):
                num_expired += len(expired)
                self._booked(known)
        return num_expired

    def sit(self, instance: str, request_id: str, seat: Seat, now: float) -> None:
        """The request will decode there; room is held from now on."""
        known = self._by_id[instance]
        known.seats[request_id] = seat
        known.context_tokens += seat.context_tokens
        known.kv_tokens += seat.kv_tokens
        self._reserved[known.node] = self._reserved.get(known.node, 0) + seat.kv_tokens
        self._seated(known, now)

    def take_seat(self, instance: str, request_id: str, now: float) -> None:
        """The request's prefill is done: it decodes."""
        known = self._by_id[instance]
        seat = known.seats[request_id]
        seat.join(now)
        known.taken.add(seat)
        self._seated(known, now)

    def leave(self, instance: str | None, request_id: str, now: float) -> None:
        known = self.get(instance)
        seat = known.seats.get(request_id) if known is not None else None
        if known is None or seat is None:
            return
        del known.seats[request_id]
        known.context_tokens -= seat.context_tokens
        known.kv_tokens -= seat.kv_tokens
        if seat.is_taken:
            known.taken.add(seat, -1)
        self._reserved[known.node] -= seat.kv_tokens
        self._seated(known, now)

    def check(self) -> None:
        """Raises InvariantError unless sums, columns and indexes agree with the instances."""
        self._refresh()
        reserved: dict[str, int] = {}
        for row, known in enumerate(self._rows):
            known.book.check()
            if known.context_tokens != sum(seat.context_tokens for seat in known.seats.values()):
                raise InvariantError(f"{known.info.id}: context_tokens {known.context_tokens} is not the sum of its seats")
            if (known.row, int(self._batch[row]), int(self._queued[row])) != (row, len(known.seats), len(known.book)):
                raise InvariantError(f"{known.info.id}: its columns say batch {self._batch[row]}, queued {self._queued[row]}")
            if tuple(self._book[:, row]) != known.book.columns or self._context[row] != known.context_tokens:
                raise InvariantError(f"{known.info.id}: its columns are not those of its book and seats")
            node = known.info.node
            reserved[node] = reserved.get(node, 0) + sum(seat.kv_tokens for seat in known.seats.values())
        free = [i.info.kv_tokens - reserved[i.info.node] for i in self._rows]
        if self._free_kv.tolist() != free:
            raise InvariantError(f"columns say {self._free_kv.tolist()} KV tokens are free, {free} are")
        roles = ([i.info.role.can_prefill for i in self._rows], [i.info.role.can_decode for i in self._rows])
        if (self._prefill_rows.tolist(), self._decode_rows.tolist()) != tuple(np.flatnonzero(can).tolist() for can in roles):
            raise InvariantError(f"rows that prefill {self._prefill_rows}, that decode {self._decode_rows}: roles are {roles}")
        if {n: r for n, r in reserved.items() if r} != {n: r for n, r in self._reserved.items() if r}:
            raise InvariantError(f"reserved {self._reserved}, seats sum to {reserved}")
        if list(self._by_id) != sorted(self._by_id) or list(self._by_id.values()) != self._rows:
            raise InvariantError(f"instances are not in order of their ids: {list(self._by_id)}")

    # --- columns -----------------------------------------------------------------------------------------------

    def _index(self) -> None:
        self._by_id = dict(sorted(self._by_id.items()))
        self._rows = list(self._by_id.values())
        count = len(self._rows)
        self._ids = tuple(self._by_id)
        self._rows_of: dict[str, list[int]] = {}
        self._bit_nodes: tuple[str | None, ...] | None = None
        self._book: Floats = np.zeros((5, count))
        self._queued: Ints = np.zeros(count, dtype=np.int64)
        self._queued_tokens: Ints = np.zeros(count, dtype=np.int64)
        self._batch: Ints = np.zeros(count, dtype=np.int64)
        self._context: Ints = np.zeros(count, dtype=np.int64)
        self._free_kv: Ints = np.zeros(count, dtype=np.int64)
        self._kv_used: Floats = np.zeros(count)
        self._taken: Ints = np.zeros((3, count), dtype=np.int64)
        self._kv_tokens: Ints = np.array([i.info.kv_tokens for i in self._rows], dtype=np.int64)
        self._max_batch: Ints = np.array([i.info.max_batch for i in self._rows], dtype=np.int64)
        self._index_roles()
        for row, known in enumerate(self._rows):
            known.row = row
            self._rows_of.setdefault(known.info.node, []).append(row)
        self._stale_books = set(range(count))
        self._stale_seats = set(range(count))

    def _index_roles(self) -> None:
        self._can_prefill: Bools = np.array([i.info.role.can_prefill for i in self._rows], dtype=np.bool_)
        self._can_decode: Bools = np.array([i.info.role.can_decode for i in self._rows], dtype=np.bool_)
        self._prefill_rows: Ints = np.flatnonzero(self._can_prefill)
        self._decode_rows: Ints = np.flatnonzero(self._can_decode)
        self._prefillers = [self._rows[row] for row in self._prefill_rows.tolist()]
        self._decoders = [self._rows[row] for row in self._decode_rows.tolist()]
        self._masks_nodes = None
        self._max_kv_tokens = max((i.info.kv_tokens for i in self._decoders), default=0)
        self._prefill_ids = self._ids_of(self._prefill_rows)
        self._decode_ids = self._ids_of(self._decode_rows)

    def _ids_of(self, rows: Ints) -> tuple[str, ...]:
        return tuple(self._ids[row] for row in rows.tolist())

    def _refresh(self) -> None:
        """Write the rows of what has changed since columns were last wanted: among a few instances that is seldom."""
        for row in self._stale_books:
            book = self._rows[row].book
            self._book[:, row] = book.columns
            self._queued[row] = len(book)
            self._queued_tokens[row] = book.tokens
        self._stale_books.clear()
        for row in self._stale_seats:
            known = self._rows[row]
            taken, kv_tokens, free = known.taken, known.info.kv_tokens, self.free_kv_tokens(known)
            self._batch[row] = len(known.seats)
            self._context[row] = known.context_tokens
            self._taken[:, row] = taken.batch, taken.context_tokens, taken.kv_tokens
            self._free_kv[row] = free
            self._kv_used[row] = 1.0 - free / max(1, kv_tokens)
        self._stale_seats.clear()

    def _booked(self, known: Instance) -> None:
        self._stale_books.add(known.row)

    def _seated(self, known: Instance, now: float) -> None:
        for row in self._rows_of[known.node]:
            self._stale_seats.add(row)
        if self._mixed_step_s is not None and known.can_prefill:
            known.book.at_pace(self._pace(known, self._mixed_step_s), now)
            self._stale_books.add(known.row)

    def _pace(self, known: Instance, step_s: float) -> float:
        """As `expected` has its batch, or what it decodes now if that is more."""
        taken, share = known.taken, self._decode_share(self.answer_tokens * step_s)
        batch, context_tokens = _rounded(share * len(known.seats)), _rounded(share * known.context_tokens)
        if batch < taken.batch:
            batch = taken.batch
        if not batch:
            return 1.0
        if context_tokens < taken.context_tokens:
            context_tokens = taken.context_tokens
        decode_s = self._costs.decode_step_s(batch, context_tokens)
        return max(LEAST_PACE, 1.0 - (decode_s + self._token_s) / step_s)

    def _stays_s(self, rows: Ints) -> Floats:
        """As `stays_s`."""
        batch, context_tokens = self._batch[rows], self._context[rows]
        least_s = np.where(self._queued[rows] > 0, self._mixed_step_s or 0.0, 0.0)
        step_s = np.maximum(least_s, self._fixed_s)
        for _ in range(ROUNDS):
            share = 1.0 / (1.0 + self.ttft_s / (self.answer_tokens * step_s))
            batch_then = np.maximum(1, (share * batch + 0.5).astype(np.int64))
            next_s = np.maximum(
                least_s, self._costs.decode_steps_s(batch_then, (share * context_tokens + 0.5).astype(np.int64))
            )
            if np.array_equal(next_s, step_s):
                break
            step_s = next_s
        stays_s: Floats = self.answer_tokens * step_s
        return stays_s

    def _decode_share(self, stays_s: float) -> float:
        """Of the time between arrival and end, what an answer takes."""
        return 1.0 / (1.0 + self.ttft_s / stays_s)

    def _wait_s(self, rows: Ints, now: float, rank: float) -> Floats:
        """All that was sent goes first unless somebody queues after `rank`; see PrefillBook.wait_s for the formula."""
        if rank < self._latest_rank:
            return np.array([self._rows[row].book.wait_s(now, rank) for row in rows.tolist()])
        pending_s, done_s, as_of_s, most_s, pace = self._book[:, rows]
        waits: Floats = (pending_s - np.minimum(done_s + np.maximum(0.0, now - as_of_s) * pace, most_s)) / pace
        return waits

    def _on_nodes(self, match: PrefixMatch, runs: Runs, block_tokens: int) -> Ints:
        """Per row, the length of the node's run in tokens: masks become arrays as a whole, for they may name every node."""
        num_bits = len(match.nodes)
        by_bit: Ints = np.zeros(num_bits + 1, dtype=np.int64)
        for mask, count in runs:
            octets = np.frombuffer(mask.to_bytes(-(-num_bits // 8), "little"), dtype=np.uint8)
            by_bit[:-1][np.unpackbits(octets, count=num_bits, bitorder="little").view(np.bool_)] = count * block_tokens
        return by_bit[self._row_bits(match.nodes)]

    def _row_bits(self, nodes: tuple[str | None, ...]) -> Ints:
        """Per row, the bit of its node in a match's masks, or one more than there are. `nodes` changes only as a whole."""
        if nodes is not self._bit_nodes:
            bits = {node: bit for bit, node in enumerate(nodes)}
            self._bit_nodes = nodes
            self._bits: Ints = np.array([bits.get(i.info.node, len(nodes)) for i in self._rows], dtype=np.int64)
        return self._bits

    def _without(self, rows: Ints, avoid: frozenset[str]) -> Ints:
        if not avoid:
            return rows
        kept = np.array([row for row in rows.tolist() if self._ids[row] not in avoid], dtype=np.int64)
        return kept if len(kept) else rows


def _rounded(number: float) -> int:
    """To the nearest, for numbers that are not negative: `round` takes twenty times as long."""
    return int(number + 0.5)
