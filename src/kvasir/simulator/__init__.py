"""The simulator body: the same brains as live, in virtual time over a heap of events. Deterministic and pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvasir.core.request import Slo
from kvasir.report.slo import ScaledSlo
from kvasir.scheduling.strategy import Strategy
from kvasir.simulator.config import SimConfig
from kvasir.simulator.faults import Fault
from kvasir.simulator.run import Run
from kvasir.simulator.simulation import Simulation
from kvasir.simulator.spec import ClusterSpec
from kvasir.workload.trace import Trace

__all__ = ["Fault", "Run", "SimConfig", "Simulation", "simulate"]


def simulate(
    trace: Trace,
    cluster: ClusterSpec,
    strategy: Strategy,
    *,
    slo: Slo | ScaledSlo,
    seed: int = 0,
    faults: Sequence[Fault] = (),
    config: SimConfig | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Run:
    """Play `trace` to `cluster` under `strategy` and say what happened. Equal arguments give equal runs.

    `on_progress` hears now and then how many requests have their outcome. Raises ConfigError for a cluster, a fault or a
    block size that cannot be. A run may go faster with the cyclic garbage collector off; collect between runs, for a
    finished simulation is one big cycle.
    """
    simulation = Simulation(trace, cluster, strategy, slo=slo, seed=seed, faults=faults, config=config, on_progress=on_progress)
    return simulation.run()
