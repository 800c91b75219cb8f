"""All questions, asked together so that they share their runs."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from kvasir.core.errors import ConfigError
from kvasir.simulator.planner.answer import Answer
from kvasir.simulator.planner.asking import Evaluate, answered, together
from kvasir.simulator.planner.layouts import disaggregate, ratio
from kvasir.simulator.planner.memory import memory
from kvasir.simulator.planner.runs import Figures, RunSpec
from kvasir.simulator.planner.setting import Setting
from kvasir.simulator.planner.sizing import fewest_nodes_from, nodes_for_load, parking
from kvasir.simulator.planner.trouble import trouble

EXPECTED_RUNS, EXPECTED_QUICK_RUNS = 60, 40
"""About how many simulations a plan takes."""


class Advice(Struct, frozen=True):
    """The answers in the order of the questions, and every run that was made, in the order made."""

    setting: Setting
    answers: tuple[Answer, ...]
    runs: dict[RunSpec, Figures]


def advise(setting: Setting, evaluate: Evaluate) -> Advice:
    """Ask everything of a cluster. Deterministic if `evaluate` is."""
    known: dict[RunSpec, Figures] = {}
    questions = (disaggregate, ratio, memory, nodes_for_load, trouble, parking)
    answers = answered(together(*(question(setting) for question in questions)), evaluate, known)
    return Advice(setting, tuple(answers), known)


def with_nodes_needed(setting: Setting, evaluate: Evaluate) -> Setting:
    """The setting with as many nodes as its load needs; `setting.nodes` is where the search starts. Raises ConfigError."""
    found = answered(fewest_nodes_from(setting, setting.run, setting.nodes), evaluate, {})
    if found.number is None:
        most = found.runs[-1].nodes
        raise ConfigError(f"{most} nodes do not serve {setting.rate:.3g} requests/s in time; give --nodes, or a looser SLO")
    return replace(setting, nodes=found.number)
