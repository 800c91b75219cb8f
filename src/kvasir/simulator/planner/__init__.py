"""The adviser: questions about a cluster that is yet to be built, each answered from a few simulations. Pure.

A question is a generator that asks for runs and ends in an `Answer` (`asking.py`); whoever evaluates the runs is a parameter.
"""

from kvasir.simulator.planner.advice import EXPECTED_QUICK_RUNS, EXPECTED_RUNS, Advice, advise, with_nodes_needed
from kvasir.simulator.planner.answer import Answer
from kvasir.simulator.planner.asking import Evaluate
from kvasir.simulator.planner.facts import TraceFacts, facts_of
from kvasir.simulator.planner.play import Player
from kvasir.simulator.planner.runs import Event, Figures, Layout, Part, RunSpec
from kvasir.simulator.planner.setting import Setting

__all__ = [
    "EXPECTED_QUICK_RUNS",
    "EXPECTED_RUNS",
    "Advice",
    "Answer",
    "Evaluate",
    "Event",
    "Figures",
    "Layout",
    "Part",
    "Player",
    "RunSpec",
    "Setting",
    "TraceFacts",
    "advise",
    "facts_of",
    "with_nodes_needed",
]
