"""The load that a layout serves, on a grid of loads, and the fixed split that serves most of it."""

from __future__ import annotations

import math

from msgspec import Struct
from msgspec.structs import replace

from kvasir.simulator.planner.answer import times
from kvasir.simulator.planner.asking import Asking, smallest_passing
from kvasir.simulator.planner.runs import Figures, Layout, RunSpec
from kvasir.simulator.planner.setting import Setting

_OCTAVES = 4
"""Loads from 1/16 to 16 times the target are tried."""

LOWEST_LOAD = 2.0**-_OCTAVES


class Capacity(Struct, frozen=True):
    """The highest load that is served, None below 1/16; `is_bound` where 16 is."""

    load: float | None
    is_bound: bool
    runs: tuple[RunSpec, ...]

    @property
    def at_least(self) -> float:
        """As a number, 0 for none."""
        return self.load or 0.0

    def __str__(self) -> str:
        if self.load is None:
            return f"less than {times(LOWEST_LOAD)}"
        return f"at least {times(self.load)}" if self.is_bound else times(self.load)


class BestSplit(Struct, frozen=True):
    """`runs` are the splits compared at one load, by their number of prefill nodes."""

    run: RunSpec
    capacity: Capacity
    runs: tuple[RunSpec, ...]


def capacity(setting: Setting, run: RunSpec, start: float = 1.0) -> Asking[Capacity]:
    """The highest load at which `run` passes."""
    steps = setting.steps_per_octave
    grid = {number: _rounded(2.0 ** (-number / steps)) for number in range(-_OCTAVES * steps, _OCTAVES * steps + 1)}
    found = yield from smallest_passing(
        lambda number: replace(run, load=grid[number]),
        start=min(grid, key=lambda number: abs(grid[number] - start)),
        lowest=min(grid),
        highest=max(grid),
    )
    load = None if found.number is None else grid[found.number]
    return Capacity(load, found.number == min(grid), found.runs[::-1])


def best_split(setting: Setting, load: float) -> Asking[BestSplit | None]:
    """Splits compared at `load`, coarse to fine: each round looks half as far to both sides of the best so far.

    None for a single node, which cannot be split.
    """
    nodes = setting.nodes
    if nodes < 2:
        return None
    step, finest = max(nodes // 4, 1), max(nodes // 16, 1) * (4 if setting.is_quick else 1)
    wanted = list(range(step, nodes, step))
    tried: dict[int, Figures] = {}
    while True:
        known = yield [_split(setting, number, load) for number in wanted]
        tried |= {number: known[_split(setting, number, load)] for number in wanted}
        best = min(tried, key=lambda number: (-tried[number].effective, tried[number].ttft_p90_s or math.inf, number))
        step //= 2
        wanted = [n for n in (best - step, best + step) if 0 < n < nodes and n not in tried]
        if step < finest or not wanted:
            break
    run = _split(setting, best, load)
    found = yield from capacity(setting, run, start=load)
    return BestSplit(run, found, tuple(_split(setting, number, load) for number in sorted(tried)))


def _split(setting: Setting, num_prefill: int, load: float) -> RunSpec:
    return replace(setting.run, layout=Layout.FIXED, num_prefill=num_prefill, load=load)


def _rounded(load: float) -> float:
    """Four significant digits: what a person can type again."""
    return float(f"{load:.4g}")
