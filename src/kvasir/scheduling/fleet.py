"""The instances that the conductor knows, and what it has given each of them to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvasir.core.commands import Candidate
from kvasir.core.errors import InvariantError
from kvasir.core.events import InstanceInfo, InstanceLoad
from kvasir.pool.directory import PrefixMatch
from kvasir.scheduling.book import PrefillBook
from kvasir.scheduling.view import DecodeView, PrefillView


class _Seat:
    """A place in a decode batch: context that will be read each step, KV that will be held."""

    __slots__ = ("context_tokens", "kv_tokens")

    def __init__(self, context_tokens: int, kv_tokens: int):
        self.context_tokens = context_tokens
        self.kv_tokens = kv_tokens


@dataclass(slots=True)
class Instance:
    """One instance: its own account in `load`, the conductor's in `book` (prefills) and `seats` (decodes)."""

    info: InstanceInfo
    load: InstanceLoad = field(default_factory=InstanceLoad)
    heartbeat_s: float | None = None
    book: PrefillBook = field(default_factory=PrefillBook)
    seats: dict[str, _Seat] = field(default_factory=dict)
    context_tokens: int = 0


class Fleet:
    """All living instances, in order of their ids; KV is reserved per node, whose arena its instances share."""

    __slots__ = ("_by_id", "_decoders", "_prefillers", "_reserved")

    def __init__(self) -> None:
        self._by_id: dict[str, Instance] = {}
        self._prefillers: list[Instance] = []
        self._decoders: list[Instance] = []
        self._reserved: dict[str, int] = {}

    def __contains__(self, instance: str) -> bool:
        return instance in self._by_id

    def get(self, instance: str | None) -> Instance | None:
        return self._by_id.get(instance) if instance is not None else None

    @property
    def instances(self) -> tuple[Instance, ...]:
        return tuple(self._by_id.values())

    @property
    def missing_role(self) -> str | None:
        """`prefill` or `decode` when no instance can do that, None when requests can be served."""
        if not self._prefillers:
            return "prefill"
        return None if self._decoders else "decode"

    @property
    def max_kv_tokens(self) -> int:
        """The longest sequence that any decoding instance can hold."""
        return max((d.info.kv_tokens for d in self._decoders), default=0)

    def join(self, info: InstanceInfo) -> None:
        self._by_id[info.id] = Instance(info)
        self._index()

    def update(self, info: InstanceInfo) -> None:
        """The same incarnation introduces itself again, maybe in another role; what it holds stays."""
        self._by_id[info.id].info = info
        self._index()

    def lose(self, instance: str) -> None:
        """Forget the instance and what was booked there; unknown ids are ignored."""
        if instance not in self._by_id:
            return
        for request_id in list(self._by_id[instance].seats):
            self.leave(instance, request_id)
        del self._by_id[instance]
        self._index()

    def prefill_views(
        self, match: PrefixMatch, *, block_tokens: int, now: float, avoid: frozenset[str]
    ) -> tuple[PrefillView, ...]:
        """Instances that can prefill. Those to `avoid` are left out unless nobody else can do their work."""
        on = match.blocks.get
        return tuple(
            PrefillView(i.info.id, i.info.node, i.book.wait_s(now), on(i.info.node, 0) * block_tokens)
            for i in _without(self._prefillers, avoid)
        )

    def decode_views(self, avoid: frozenset[str]) -> tuple[DecodeView, ...]:
        """Instances that can decode, as above."""
        return tuple(
            DecodeView(
                id=i.info.id,
                node=i.info.node,
                batch=len(i.seats),
                context_tokens=i.context_tokens,
                free_kv_tokens=i.info.kv_tokens - self._reserved.get(i.info.node, 0),
                max_batch=i.info.max_batch,
            )
            for i in _without(self._decoders, avoid)
        )

    def least_wait_s(self, now: float) -> float:
        """When the first prefill instance will have drained."""
        return min((i.book.wait_s(now) for i in self._prefillers), default=0.0)

    def sent(self, request_id: str, candidate: Candidate, *, new_tokens: int, now: float) -> None:
        """A prefill is on its way."""
        seconds = candidate.transfer_s + candidate.prefill_s
        self._by_id[candidate.instance].book.sent(request_id, seconds=seconds, tokens=new_tokens, now=now)

    def done(self, instance: str, request_id: str, now: float) -> None:
        """The prefill is over, one way or another."""
        if (known := self._by_id.get(instance)) is not None:
            known.book.left(request_id, now)

    def sit(self, instance: str, request_id: str, *, context_tokens: int, kv_tokens: int) -> None:
        """The request will decode there; room is held from now on."""
        known = self._by_id[instance]
        known.seats[request_id] = _Seat(context_tokens, kv_tokens)
        known.context_tokens += context_tokens
        self._reserved[known.info.node] = self._reserved.get(known.info.node, 0) + kv_tokens

    def leave(self, instance: str | None, request_id: str) -> None:
        known = self.get(instance)
        seat = known.seats.pop(request_id, None) if known is not None else None
        if known is None or seat is None:
            return
        known.context_tokens -= seat.context_tokens
        self._reserved[known.info.node] -= seat.kv_tokens

    def check(self) -> None:
        """Raises InvariantError unless sums and indexes agree with the instances."""
        reserved: dict[str, int] = {}
        for known in self._by_id.values():
            known.book.check()
            if known.context_tokens != sum(seat.context_tokens for seat in known.seats.values()):
                raise InvariantError(f"{known.info.id}: context_tokens {known.context_tokens} is not the sum of its seats")
            node = known.info.node
            reserved[node] = reserved.get(node, 0) + sum(seat.kv_tokens for seat in known.seats.values())
        if {n: r for n, r in reserved.items() if r} != {n: r for n, r in self._reserved.items() if r}:
            raise InvariantError(f"reserved {self._reserved}, seats sum to {reserved}")

    def _index(self) -> None:
        self._by_id = dict(sorted(self._by_id.items()))
        self._prefillers = [i for i in self._by_id.values() if i.info.role.can_prefill]
        self._decoders = [i for i in self._by_id.values() if i.info.role.can_decode]


def _without(instances: list[Instance], avoid: frozenset[str]) -> list[Instance]:
    if not avoid:
        return instances
    return [i for i in instances if i.info.id not in avoid] or instances
