"""Prefill placement: one policy per file, one row per policy in this table."""

from __future__ import annotations

from collections.abc import Callable

from kvasir.scheduling.policies.aibrix import Aibrix, AibrixConductor
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.policies.dynamo import Dynamo
from kvasir.scheduling.policies.interface import Placement
from kvasir.scheduling.policies.kvasir import Kvasir
from kvasir.scheduling.policies.least_loaded import LeastLoaded
from kvasir.scheduling.policies.llm_d import LlmD
from kvasir.scheduling.policies.local import Local
from kvasir.scheduling.policies.memserve import MemServe
from kvasir.scheduling.policies.mooncake import Mooncake
from kvasir.scheduling.policies.production_stack import ProductionStack
from kvasir.scheduling.policies.random_choice import RandomChoice
from kvasir.scheduling.policies.ray import Ray
from kvasir.scheduling.policies.round_robin import RoundRobin
from kvasir.scheduling.policies.sglang import Sglang

POLICIES: dict[str, Callable[[], Placement]] = {
    "kvasir": Kvasir,
    "random": RandomChoice,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "local": Local,
    "mooncake": Mooncake,
    "memserve": MemServe,
    "dynamo": Dynamo,
    "llm-d": LlmD,
    "sglang": Sglang,
    "aibrix": Aibrix,
    "aibrix-conductor": AibrixConductor,
    "ray": Ray,
    "production-stack": ProductionStack,
}
"""Name on the command line → a new policy with its default parameters."""

__all__ = ["POLICIES", "Choice", "Kvasir", "LeastLoaded", "Local", "Mooncake", "Placement", "RandomChoice", "RoundRobin"]
