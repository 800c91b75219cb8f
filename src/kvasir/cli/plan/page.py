"""The HTML page of a plan: a plot under each question, with its answer, then the runs."""

from __future__ import annotations

from collections.abc import Iterator

from kvasir.cli.plan.outcome import Outcome
from kvasir.cli.plan.plots import PLOTS, curves
from kvasir.report.html import Headline, Page, Plot, Table
from kvasir.report.plots.svg import svg_of
from kvasir.simulator.planner import Answer
from kvasir.simulator.planner.answer import count, percent, size, times


def page_of(outcome: Outcome) -> Page:
    """Everything that the plan says, in the order of its questions."""
    answers = outcome.advice.answers
    setting = outcome.advice.setting
    return Page(
        title=f"A plan for {outcome.trace_name}",
        subtitle=f"{count(setting.nodes, 'node')} of {outcome.hardware}, {outcome.model}, {setting.rate:.3g} requests/s",
        headlines=tuple(_headlines({answer.key: answer for answer in answers}, setting.nodes)),
        notes=(*outcome.notes, *(f"{answer.question} {answer.text}" for answer in answers if not answer.runs)),
        plots=tuple(
            Plot(answer.question, svg_of(answer.key, curves(PLOTS[answer.key](answer, outcome.advice.runs))), answer.text)
            for answer in answers
            if answer.runs
        ),
        tables=tuple(Table(answer.question, answer.header, answer.rows) for answer in answers if answer.runs),
        conditions=tuple(outcome.conditions()),
        command=outcome.command,
    )


def _headlines(answers: dict[str, Answer], nodes: int) -> Iterator[Headline]:
    """The figures that decide, where they are known."""
    keys = ("disaggregate", "ratio", "memory", "nodes", "parking")
    capacity, split, kept, sizing, parking = (answers[key].values for key in keys)
    served = capacity["capacity_load"]["elastic"] or 0.0
    yield Headline("Elastic roles serve", times(served), "the target load", served >= 1)
    if split:
        best = split["best_split_capacity_load"] or 0.0
        yield Headline("The best fixed split", split["best_split"], f"serves {times(best)}")
    if "knee_hit_rate" in kept:
        yield Headline("DRAM per node", size(kept["knee_dram_bytes_per_node"]), f"hit rate {percent(kept['knee_hit_rate'])}")
    needed = sizing["nodes_needed"]["1x"]
    yield Headline("Nodes needed", str(needed or "-"), f"for the target load, of {nodes}", bool(needed and needed <= nodes))
    low = parking["nodes_needed_at_quarter_load"] or nodes
    yield Headline("Can be parked", str(max(nodes - low, 0)), "nodes, at a quarter of the load")
