"""How many nodes a load needs, and how many of them can be parked when it is low."""

from __future__ import annotations

import math

from msgspec.structs import replace

from kvasir.simulator.planner.answer import (
    LOAD,
    NODES,
    OUTCOME,
    PART,
    REJECTED,
    Answer,
    answer,
    count,
    percent,
    sentences,
    times,
)
from kvasir.simulator.planner.asking import Asking, Search, smallest_passing, together
from kvasir.simulator.planner.capacity import LOWEST_LOAD, capacity
from kvasir.simulator.planner.runs import Part, RunSpec
from kvasir.simulator.planner.setting import Setting

LOADS = (0.5, 1.0, 2.0)
LOW_LOAD = 0.25

_MOST = 32
"""The search ends at this many times the nodes as given."""

_PARTS, _QUICK_PARTS = 16, 4
"""Numbers of nodes are exact up to this many, and to one part in as many above."""


def fewest_nodes(setting: Setting, run: RunSpec) -> Asking[Search]:
    """How many nodes serve the run, from a guess in proportion to what the nodes as given serve."""
    served = yield from capacity(setting, setting.run)
    load = run.load * (setting.facts.quiet_load if run.part is Part.QUIET else 1.0)
    found = yield from fewest_nodes_from(setting, run, setting.nodes * load / (served.load or LOWEST_LOAD))
    return found


def fewest_nodes_from(setting: Setting, run: RunSpec, guess: float) -> Asking[Search]:
    """How many nodes serve the run; None where even many times the given do not."""
    most = setting.nodes * _MOST
    start = min(max(1, math.ceil(guess)), most)
    unit = max(1, start // (_QUICK_PARTS if setting.is_quick else _PARTS))
    found = yield from smallest_passing(
        lambda n: replace(run, nodes=n * unit), start=-(-start // unit), lowest=1, highest=max(most // unit, 1)
    )
    return Search(found.number and found.number * unit, found.runs)


def nodes_for_load(setting: Setting) -> Asking[Answer]:
    """For the target load, half and twice of it, with the memory per node as given."""
    searches = yield from together(*(fewest_nodes(setting, replace(setting.run, load=load)) for load in LOADS))
    known = yield []
    found = dict(zip(LOADS, searches, strict=True))
    per_rate = "; ".join(
        f"{times(load)} ({setting.rate * load:.3g} requests/s) {_needed(search)}" for load, search in found.items() if load != 1
    )
    return answer(
        "nodes",
        "How many nodes?",
        f"The target load of {setting.rate:.3g} requests/s {_needed(found[1.0])} ({setting.nodes} are given); {per_rate}.",
        runs=[run for search in searches for run in search.runs],
        known=known,
        columns=(LOAD, NODES, *OUTCOME, REJECTED),
        values={"nodes_needed": {times(load): search.number for load, search in found.items()}},
    )


def parking(setting: Setting) -> Asking[Answer]:
    """At a quarter of the target load, and in the quietest stretch of the trace."""
    facts = setting.facts
    lows = (replace(setting.run, load=LOW_LOAD), replace(setting.run, part=Part.QUIET))
    searches = yield from together(*(fewest_nodes(setting, run) for run in lows))
    known = yield []
    parked = [_parked(setting, search) for search in searches]
    return answer(
        "parking",
        "How many nodes can be parked when the load is low?",
        sentences(
            f"At a quarter of the target load, {parked[0]}.",
            f"In the quietest eighth of the trace ({percent(facts.quiet_load)} of its mean load), {parked[1]}.",
            f"But {facts.unknown_times}." if facts.unknown_times else "",
        ),
        runs=[run for search in searches for run in search.runs],
        known=known,
        columns=(PART, LOAD, NODES, *OUTCOME, REJECTED),
        values={
            "nodes_needed_at_quarter_load": searches[0].number,
            "nodes_needed_in_quiet_stretch": searches[1].number,
            "quiet_start_s": facts.quiet_start_s,
            "quiet_s": facts.quiet_s,
            "quiet_load": facts.quiet_load,
        },
    )


def _needed(search: Search) -> str:
    return f"needs {count(search.number, 'node')}" if search.number else f"is not served by {search.runs[-1].nodes} nodes"


def _parked(setting: Setting, search: Search) -> str:
    if search.number is None or search.number >= setting.nodes:
        return "none can be parked"
    return f"{setting.nodes - search.number} of the {count(setting.nodes, 'node')} can be parked: {search.number} will do"
