"""Prefill placement: one policy per file, one row per policy in this table."""

from __future__ import annotations

from collections.abc import Callable

from kvasir.scheduling.policies.interface import Choice, Placement
from kvasir.scheduling.policies.least_loaded import LeastLoaded
from kvasir.scheduling.policies.local import Local
from kvasir.scheduling.policies.mooncake import Mooncake
from kvasir.scheduling.policies.random_choice import RandomChoice
from kvasir.scheduling.policies.round_robin import RoundRobin

POLICIES: dict[str, Callable[[], Placement]] = {
    "random": RandomChoice,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "local": Local,
    "mooncake": Mooncake,
}
"""Name on the command line → a new policy with its default parameters."""

__all__ = ["POLICIES", "Choice", "LeastLoaded", "Local", "Mooncake", "Placement", "RandomChoice", "RoundRobin"]
