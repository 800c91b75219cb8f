"""One instance as the conductor knows it: who it is, what it was given to prefill, and who decodes there."""

from __future__ import annotations

from dataclasses import dataclass, field

from mypy_extensions import mypyc_attr

from kvasir.core.events import InstanceInfo
from kvasir.scheduling.book import PrefillBook


@mypyc_attr(acyclic=True)
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


@mypyc_attr(acyclic=True)
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
    """One instance and what it was given, in `book` (prefills) and `seats` (decodes).

    Its scales are how many times as long as predicted its steps take; None where it has not measured any.
    """

    info: InstanceInfo
    book: PrefillBook = field(default_factory=PrefillBook)
    seats: dict[str, Seat] = field(default_factory=dict)
    context_tokens: int = 0
    kv_tokens: int = 0
    taken: Taken = field(default_factory=Taken)
    id: str = ""
    epoch: int = 0
    node: str = ""
    max_batch: int = 0
    max_kv_tokens: int = 0
    can_prefill: bool = False
    can_decode: bool = False
    prefill_scale: float | None = None
    decode_scale: float | None = None

    def __post_init__(self) -> None:
        self.introduce(self.info)

    def introduce(self, info: InstanceInfo) -> None:
        """It is this now. What is asked for in each decision is at hand without a look into `info`."""
        self.info = info
        self.id, self.epoch, self.node = info.id, info.epoch, info.node
        self.max_batch, self.max_kv_tokens = info.max_batch, info.kv_tokens
        self.can_prefill, self.can_decode = info.role.can_prefill, info.role.can_decode
