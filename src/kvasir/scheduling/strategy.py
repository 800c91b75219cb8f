"""A whole scheduler by name: placement, decode choice, admission, queue order, roles, replication, eviction, chunking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from kvasir.core.request import Slo
from kvasir.costs.model import CostModel
from kvasir.report.slo import ScaledSlo
from kvasir.scheduling.admission import ADMISSIONS
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.chunking import BatcherConfig
from kvasir.scheduling.conductor import Conductor
from kvasir.scheduling.placer import ConductorConfig
from kvasir.scheduling.policies import POLICIES, Placement


@dataclass(frozen=True, slots=True)
class Strategy:
    """What `--policy NAME` stands for; each part is a row of its own table and can be replaced by itself."""

    name: str
    placement: Callable[[], Placement]
    admission: str = "slo"
    eviction: str = "lru"

    def conductor(self, config: ConductorConfig, costs: CostModel, slo: Slo | ScaledSlo, rng: Random) -> Conductor:
        admission = ADMISSIONS[self.admission](slo)
        return Conductor(config, costs, policy=self.placement(), rng=rng, admission=admission)

    def batcher(self, config: BatcherConfig, costs: CostModel) -> Batcher:
        return Batcher(config, costs)


STRATEGIES: dict[str, Strategy] = {name: Strategy(name, placement) for name, placement in POLICIES.items()}
"""Name on the command line → scheduler."""
