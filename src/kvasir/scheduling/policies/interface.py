"""What every prefill placement policy is: one method from a view of the cluster to a choice."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Protocol

from msgspec import Struct

from kvasir.core.commands import Candidate
from kvasir.scheduling.view import ClusterView


class Choice(Struct, frozen=True):
    """`candidates` are what the policy compared, in order of instance id; `why` finishes the sentence "chosen by ..."."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    why: str


class Placement(Protocol):
    """Picks the prefill instance, and whether to fetch a longer prefix. Equal scores go to the lower instance id.

    `name` is its row in the table, for configuration, decisions and metrics.
    """

    @property
    def name(self) -> str: ...

    def place(self, view: ClusterView, rng: Random) -> Choice:
        """`view.prefills` is not empty. Draw only from `rng`."""
        ...


def least_ttft(candidates: Iterable[Candidate], why: str) -> Choice:
    """The least predicted TTFT."""
    listed = tuple(candidates)
    return Choice(min(listed, key=_ttft_then_id), listed, why)


def _ttft_then_id(candidate: Candidate) -> tuple[float, str]:
    return candidate.ttft_s, candidate.instance
