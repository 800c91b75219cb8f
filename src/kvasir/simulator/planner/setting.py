"""What is given when the questions are asked."""

from __future__ import annotations

from msgspec import Struct

from kvasir.simulator.planner.facts import TraceFacts
from kvasir.simulator.planner.runs import RunSpec


class Setting(Struct, frozen=True):
    """`nodes` with `dram_bytes` and `ssd_bytes` each; the target load in requests per second; what the trace says.

    `working_set_bytes`: KV of all distinct prompt blocks. `can_ssd`: whether the hardware's SSD bandwidth is known. `is_quick`:
    coarser grids.
    """

    nodes: int
    dram_bytes: int
    ssd_bytes: int
    rate: float
    working_set_bytes: int
    can_ssd: bool
    facts: TraceFacts
    is_quick: bool = False

    @property
    def steps_per_octave(self) -> int:
        """Of the grid of loads on which capacities are found: exact to 9 %, quick ones to 26 %."""
        return 3 if self.is_quick else 8

    @property
    def run(self) -> RunSpec:
        """The cluster as given, elastic, at the target load: what all questions vary."""
        return RunSpec(nodes=self.nodes, dram_bytes=self.dram_bytes, ssd_bytes=self.ssd_bytes)
