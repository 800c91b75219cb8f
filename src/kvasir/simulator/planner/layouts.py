"""Disaggregate or not, and in which ratio."""

from __future__ import annotations

from msgspec.structs import replace

from kvasir.simulator.planner.answer import LAYOUT, LOAD, OUTCOME, REJECTED, Answer, answer, count, percent, sentences, times
from kvasir.simulator.planner.asking import Asking, together
from kvasir.simulator.planner.capacity import BestSplit, Capacity, best_split, capacity
from kvasir.simulator.planner.runs import Layout
from kvasir.simulator.planner.setting import Setting

WORTH = 1.1
"""A capacity this many times another's is worth having; less is within the grid of loads and the luck of one trace."""


def disaggregate(setting: Setting) -> Asking[Answer]:
    """Capacities of co-located, fixed and elastic roles."""
    layouts = (Layout.ELASTIC, Layout.COLOCATED, Layout.CHUNKED)
    capacities = yield from together(*(capacity(setting, replace(setting.run, layout=layout)) for layout in layouts))
    found: dict[str, Capacity] = {layout.value: each for layout, each in zip(layouts, capacities, strict=True)}
    split = yield from best_split(setting, found[Layout.ELASTIC].load or setting.run.load)
    if split is not None:
        found[split.run.split] = split.capacity
    known = yield [setting.run]
    share = known[setting.run].effective_requests
    return answer(
        "disaggregate",
        "Disaggregate or not?",
        f"{_verdict(found, split)} At the target load, elastic roles answer {percent(share)} of the requests in time.",
        runs=[run for each in found.values() for run in each.runs],
        known=known,
        columns=(LAYOUT, LOAD, *OUTCOME, REJECTED),
        values={"capacity_load": {name: each.load for name, each in found.items()}, "effective_requests_at_target": share},
    )


def ratio(setting: Setting) -> Asking[Answer]:
    """All splits that were tried beside elastic roles, at the load that elastic roles just serve."""
    elastic = yield from capacity(setting, setting.run)
    load = elastic.load or setting.run.load
    split = yield from best_split(setting, load)
    known = yield [replace(setting.run, load=load)]
    if split is None:
        return Answer("ratio", "Which ratio of prefill to decode?", "One node cannot be split; its instance does both.")
    runs = [*split.runs, replace(setting.run, load=load)]
    worst = min(split.runs, key=lambda run: known[run].effective)
    effective = {run.name: known[run].effective for run in runs}
    return answer(
        "ratio",
        "Which ratio of prefill to decode?",
        sentences(
            _advice(elastic, split),
            f"At {times(load)}, splits get from {percent(effective[worst.split])} ({worst.split}) to"
            f" {percent(effective[split.run.split])} ({split.run.split}) of the work done in time, elastic roles"
            f" {percent(effective[runs[-1].name])}.",
        ),
        runs=runs,
        known=known,
        columns=(LAYOUT, LOAD, *OUTCOME, REJECTED),
        values={
            "best_split": split.run.split,
            "best_split_capacity_load": split.capacity.load,
            "elastic_capacity_load": elastic.load,
            "effective": effective,
        },
    )


def _verdict(found: dict[str, Capacity], split: BestSplit | None) -> str:
    elastic, whole, chunked = (found[layout] for layout in (Layout.ELASTIC, Layout.COLOCATED, Layout.CHUNKED))
    colocated = max(whole.at_least, chunked.at_least)
    rivals = f"co-located instances serve {chunked} with chunked prefill and {whole} without it"
    if split is None:
        ours = f"Kvasir's elastic scheduler serves {elastic} the target load"
        return f"A single node has nothing to disaggregate: {ours}; {rivals}."
    best = max(elastic.at_least, split.capacity.at_least)
    if not best and not colocated:
        here = count(split.run.nodes, "node")
        return f"On {here} nothing serves even a sixteenth of the target load: more of them, or a looser SLO."
    ours = f"elastic roles serve {elastic} the target load, the best fixed split ({split.run.split}) {split.capacity}"
    if best >= WORTH * colocated:
        return f"Disaggregate: {ours}; {rivals}."
    if colocated >= WORTH * best:
        return f"Do not: {ours}; {rivals}."
    return f"It makes little difference: {ours}; {rivals}."


def _advice(elastic: Capacity, split: BestSplit) -> str:
    fixed = split.capacity
    if WORTH * elastic.at_least >= fixed.at_least:
        rival = f"the best fixed split ({split.run.split}) {fixed}"
        return f"Let roles follow the load: they serve {elastic} the target load, {rival}."
    return f"Fix {split.run.split}: it serves {fixed} the target load, elastic roles {elastic}."
