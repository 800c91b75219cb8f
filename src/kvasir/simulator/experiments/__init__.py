"""The figures of the Mooncake papers as experiments on the simulator; a row each, in the order of the report."""

from __future__ import annotations

from typing import Any

from kvasir.core.errors import ConfigError
from kvasir.simulator.experiments import (
    bandwidth,
    effective_capacity,
    hit_rate,
    local_global,
    long_prompts,
    overload,
    placement,
    prefill_time,
    ratio,
    replicas,
)
from kvasir.simulator.experiments.experiment import Bed, Cell, Column, Experiment, Figure, Grid

__all__ = ["EXPERIMENTS", "Bed", "Cell", "Column", "Experiment", "Figure", "Grid", "experiments"]

EXPERIMENTS: dict[str, Experiment[Any]] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        hit_rate,
        placement,
        effective_capacity,
        prefill_time,
        local_global,
        replicas,
        bandwidth,
        ratio,
        overload,
        long_prompts,
    )
}
"""Name on the command line → experiment."""


def experiments(names: list[str]) -> list[Experiment[Any]]:
    """Those of these names in the table's order, all if there are none. Raises ConfigError."""
    for name in names:
        if name not in EXPERIMENTS:
            raise ConfigError(f"unknown experiment {name!r}; known are {', '.join(EXPERIMENTS)}")
    return [experiment for name, experiment in EXPERIMENTS.items() if not names or name in names]
