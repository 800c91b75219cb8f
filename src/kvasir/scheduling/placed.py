"""A request on its way through the cluster, as the conductor tracks it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mypy_extensions import mypyc_attr

from kvasir.core.request import Request


class State(StrEnum):
    """Before a request arrives, and after its outcome, the conductor knows nothing of it."""

    PREFILLING = "prefilling"
    DECODING = "decoding"


@mypyc_attr(acyclic=True)
class Placed:
    """`decode` is None while its decode instance is lost and the prefill not done: the next is chosen then.

    `hands_off`: the prefill instance was told to give the request away when its prompt is done. All `members` prefill it: the
    stages of a chunked pipeline, or `prefill` alone, which is the last of them.
    """

    __slots__ = ("attempts", "decode", "failed_on", "hands_off", "members", "prefill", "request", "state")

    def __init__(
        self,
        request: Request,
        prefill: str,
        *,
        group: tuple[str, ...],
        hands_off: bool,
        attempts: int,
        failed_on: frozenset[str],
    ):
        self.request = request
        self.state = State.PREFILLING
        self.prefill = prefill
        self.members = group or (prefill,)
        self.decode: str | None = None
        self.hands_off = hands_off
        self.attempts = attempts
        self.failed_on = failed_on

    @property
    def holders(self) -> tuple[str, ...]:
        """Who works on it now."""
        return self.members if self.state is State.PREFILLING else (self.decoder,)

    @property
    def decoder(self) -> str:
        """Where it decodes or will; only for a request that has such a place."""
        assert self.decode is not None, "the request has no decode instance"
        return self.decode


@dataclass(frozen=True, slots=True)
class Homeless:
    """A request that lost its instance while no other could take it. It waits since `since_s` for one to come back."""

    placed: Placed
    why: str
    since_s: float
