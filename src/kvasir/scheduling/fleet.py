"""The instances that the conductor knows, and what it has given each of them to do."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from msgspec import structs

from kvasir.core.errors import InvariantError
from kvasir.core.events import InstanceInfo
from kvasir.costs.model import CostModel
from kvasir.costs.quick import quick
from kvasir.pool.match import PrefixMatch
from kvasir.scheduling.columns import DecodeTable, PrefillTable
from kvasir.scheduling.contenders import Contenders
from kvasir.scheduling.instance import Instance, Seat, Taken
from kvasir.scheduling.plan import Outlook
from kvasir.scheduling.view import Bools, DecodeColumns, Floats, Ints, PrefillColumns

LEAST_PACE: Final = 0.02
"""An instance whose decode steps leave no slack still prefills a little: a prediction must stay finite."""

ANY_S: Final = math.inf
"""Seconds to spare where nobody is put off."""

ROUNDS: Final = 6
"""The longer steps take, the more answers are under way at a time, and so on: each round halves the error, or better."""


class Fleet:
    """All living instances, in order of their ids; KV is reserved per node, whose arena its instances share.

    What placement reads of every instance is kept in columns, too, from when they are first asked for. With `mixed_step_s`,
    the longest step that an instance may take while it decodes, prefill on it is predicted to run in what decode leaves of
    that.
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
        self._contenders: Contenders | None = None  # these three are made when they are first wanted: of a few, seldom
        self._prefill_table: PrefillTable | None = None
        self._decode_table: DecodeTable | None = None
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
    def decodes_both_ways(self) -> bool:
        """Whether some of the decoders may prefill, too, and others only decode."""
        return self._decodes_both_ways

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
        """Instances that can prefill, for a prompt that would queue at `rank`. Valid until the fleet changes.

        Those to `avoid` are left out unless nobody else can do their work.
        """
        if self._prefill_table is None:
            self._prefill_table = PrefillTable(self._prefillers, self._reserved)
        columns = self._prefill_table.columns(match, block_tokens, now, rank)
        kept = _without(columns.ids, avoid)
        return columns if kept is None else columns.only(kept)

    def decode_columns(self, avoid: frozenset[str]) -> DecodeColumns:
        """Instances that can decode, as above."""
        columns = self._decodes().columns(self._stays_s)
        kept = _without(columns.ids, avoid)
        return columns if kept is None else columns.only(kept)

    @property
    def latest_rank(self) -> float:
        """No prefill that was ever sent has a later one."""
        return self._latest_rank

    @property
    def contenders(self) -> Contenders:
        """Who of `prefillers` can be best, made when it is first wanted."""
        if self._contenders is None:
            self._contenders = Contenders(self._prefillers)
        return self._contenders

    def least_expected(self, in_s: float) -> Floats:
        """Of each of `decoders`, the context tokens that it decodes in so many seconds at least; to be used at once.

        As DecodeColumns.expected has it for an answer that has an instance to itself: nowhere does it leave sooner.
        """
        stayed, came = shares_in(in_s, self.answer_tokens * self._long_run_s(0, 0, 0.0))
        return self._decodes().context_tokens_of(stayed, came)

    @property
    def decoders_that_prefill(self) -> Bools:
        """Which of `decoders` may prefill, too."""
        return self._decodes().can_prefill

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
            self._masks = match.masks_of([known.node for known in self._prefillers])
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
        least_s = self._mixed_step_s if self._mixed_step_s is not None and len(instance.book) else 0.0
        return self._long_run_s(len(instance.seats), instance.context_tokens, least_s)

    def _long_run_s(self, batch: int, context_tokens: int, least_s: float) -> float:
        step_s = max(least_s, self._fixed_s)
        for _round in range(ROUNDS):  # `_` would be an object
            share = self._decode_share(self.answer_tokens * step_s)
            batch_then, context_then = _rounded(share * batch), _rounded(share * context_tokens)
            if batch_then < 1:
                batch_then = 1
            next_s = self._costs.decode_step_s(batch_then, context_then)
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

    def reported(self, known: Instance, waiting_tokens: int, *, settle_s: float, now: float) -> None:
        """The instance's own account of its queues."""
        if len(known.book):
            known.book.reported(waiting_tokens, sent_before_s=now - settle_s, now=now)
            self._booked(known)

    def calibrate(self) -> None:
        """Predict as steps were measured: by the mean of those that have the phase. What nobody measured stays as it is."""
        prefill = [scale for known in self._prefillers if (scale := known.prefill_scale) is not None]
        decode = [scale for known in self._decoders if (scale := known.decode_scale) is not None]
        if not prefill and not decode:
            return
        costs = self._costs
        before = costs.prefill_scale
        costs.scale(_mean(prefill, before), _mean(decode, costs.decode_scale))
        self._token_s, self._fixed_s = costs.prefill_s(1, 0), costs.decode_step_s(1, 0)
        if costs.prefill_scale != before:
            for known in self._rows:
                known.book.rescale(costs.prefill_scale / before)
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
        reserved: dict[str, int] = {}
        for known in self._rows:
            known.book.check()
            if known.context_tokens != sum(seat.context_tokens for seat in known.seats.values()):
                raise InvariantError(f"{known.info.id}: context_tokens {known.context_tokens} is not the sum of its seats")
            node = known.info.node
            reserved[node] = reserved.get(node, 0) + sum(seat.kv_tokens for seat in known.seats.values())
        roles = ([i.id for i in self._rows if i.info.role.can_prefill], [i.id for i in self._rows if i.info.role.can_decode])
        if ([i.id for i in self._prefillers], [i.id for i in self._decoders]) != roles:
            raise InvariantError(f"{self._prefillers} prefill, {self._decoders} decode: roles are {roles}")
        if {n: r for n, r in reserved.items() if r} != {n: r for n, r in self._reserved.items() if r}:
            raise InvariantError(f"reserved {self._reserved}, seats sum to {reserved}")
        if list(self._by_id) != sorted(self._by_id) or list(self._by_id.values()) != self._rows:
            raise InvariantError(f"instances are not in order of their ids: {list(self._by_id)}")
        if self._prefill_table is not None:
            self._prefill_table.check_as(PrefillTable(self._prefillers, self._reserved))
        if self._decode_table is not None:
            self._decode_table.check_as(DecodeTable(self._decoders, self._reserved))
        if self._contenders is not None:
            self._contenders.check()

    # --- indexes -----------------------------------------------------------------------------------------------

    def _index(self) -> None:
        self._by_id = dict(sorted(self._by_id.items()))
        self._rows = list(self._by_id.values())
        self._on_node: dict[str, list[Instance]] = {}
        for known in self._rows:
            self._on_node.setdefault(known.info.node, []).append(known)
        self._index_roles()

    def _index_roles(self) -> None:
        self._prefillers = [known for known in self._rows if known.can_prefill]
        self._decoders = [known for known in self._rows if known.can_decode]
        self._max_kv_tokens = max([known.max_kv_tokens for known in self._decoders], default=0)
        self._decodes_both_ways = len({known.can_prefill for known in self._decoders}) == 2
        self._masks_nodes = None
        self._prefill_table = None
        self._decode_table = None
        self._contenders = None

    def _decodes(self) -> DecodeTable:
        if self._decode_table is None:
            self._decode_table = DecodeTable(self._decoders, self._reserved)
        return self._decode_table

    def _booked(self, known: Instance) -> None:
        if self._prefill_table is not None:
            self._prefill_table.booked(known)
        if self._decode_table is not None:
            self._decode_table.booked(known)
        if self._contenders is not None:
            self._contenders.booked(known)

    def _seated(self, known: Instance, now: float) -> None:
        if self._prefill_table is not None:
            self._prefill_table.seated(self._on_node[known.node])
        if self._decode_table is not None:
            self._decode_table.seated(self._on_node[known.node])
        if self._mixed_step_s is not None and known.can_prefill:
            known.book.at_pace(self._pace(known, self._mixed_step_s), now)
            self._booked(known)

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

    def _stays_s(self, columns: DecodeColumns) -> Floats:
        """As `stays_s`."""
        batch, context_tokens = columns.batch, columns.context_tokens
        least_s = np.where(columns.queued > 0, self._mixed_step_s or 0.0, 0.0)
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


def shares_in(in_s: float, stays_s: float) -> tuple[float, float]:
    """Who is there in so many seconds, of those that decode now and of those in prefill: see DecodeColumns.expected."""
    return max(0.0, 1.0 - in_s / stays_s), min(1.0, stays_s / in_s) if in_s > 0.0 else 1.0


def _without(ids: tuple[str, ...], avoid: frozenset[str]) -> Ints | None:
    """The rows that remain; None where all do, be it because nobody else can do their work."""
    if not avoid:
        return None
    kept = [row for row, name in enumerate(ids) if name not in avoid]
    return np.array(kept, dtype=np.int64) if 0 < len(kept) < len(ids) else None


def _mean(numbers: list[float], otherwise: float) -> float:
    return sum(numbers) / len(numbers) if numbers else otherwise


def _rounded(number: float) -> int:
    """To the nearest, for numbers that are not negative: `round` takes twenty times as long."""
    return int(number + 0.5)
