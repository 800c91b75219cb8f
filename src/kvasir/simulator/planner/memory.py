"""How much DRAM and SSD for KVCache are worth having."""

from __future__ import annotations

from itertools import pairwise

from msgspec import Struct
from msgspec.structs import replace

from kvasir.report.summary import Json
from kvasir.simulator.planner.answer import HIT_RATE, Answer, Column, answer, percent, sentences, size
from kvasir.simulator.planner.asking import Asking, Known
from kvasir.simulator.planner.capacity import capacity
from kvasir.simulator.planner.runs import RunSpec
from kvasir.simulator.planner.setting import Setting

GIB = 2**30

KNEE_SHARE = 0.9
"""The knee: the smallest size with this share of the largest one's hit rate."""

_SIZES, _QUICK_SIZES = 7, 4
_QUESTION = "How much DRAM and SSD?"


class Step(Struct, frozen=True):
    """What a node's DRAM brings, from `smaller` to `larger`: per GiB of each node, prefill seconds over the whole trace."""

    smaller: RunSpec
    larger: RunSpec
    hit_points_per_gib: float
    prefill_s_per_gib: float


def memory(setting: Setting) -> Asking[Answer]:
    """DRAM sizes up to one that holds everything, then SSDs behind a quarter of the DRAM at the knee, and behind all of it."""
    facts = setting.facts
    if not facts.has_sharing:
        known_not = f"Not known ({facts.unknown_sharing})" if facts.unknown_sharing else "Nothing"
        return Answer(
            "memory",
            _QUESTION,
            f"{known_not}: no two prompts of this trace share a block, so every size has a hit rate of 0 here. A cache can only"
            " do better than the other answers say.",
        )
    elastic = yield from capacity(setting, setting.run)
    load = min(setting.run.load, elastic.load or setting.run.load)
    dram_runs = [replace(setting.run, dram_bytes=each, ssd_bytes=0, load=load) for each in _sizes(setting)]
    known = yield dram_runs
    knee = _knee(dram_runs, known)
    ssd_runs = _with_ssd(setting, knee)
    known = yield [*dram_runs, *ssd_runs]
    steps = [_step(setting, a, b, known) for a, b in pairwise(dram_runs)]
    by_larger = {step.larger: step for step in steps}

    def marginal(name: str, of: str, scale: float) -> Column:
        return (name, lambda run, _: f"{getattr(by_larger[run], of) * scale:.3g}" if run in by_larger else "-")

    return answer(
        "memory",
        _QUESTION,
        sentences(
            _dram_text(dram_runs, knee, by_larger, known),
            _ssd_text(knee, ssd_runs, known),
            f"Lower bounds ({facts.unknown_sharing})." if facts.unknown_sharing else "",
        ),
        runs=[*dram_runs, *ssd_runs],
        known=known,
        columns=(
            ("DRAM/node", lambda run, f: size(run.dram_bytes)),
            ("SSD/node", lambda run, f: size(run.ssd_bytes) if run.ssd_bytes else "-"),
            ("DRAM in all", lambda run, f: size(run.dram_bytes * run.nodes)),
            HIT_RATE,
            ("prefill s/request", lambda run, f: f"{f.prefill_s_per_request:.3g}"),
            marginal("hit points per GiB/node", "hit_points_per_gib", 1.0),
            marginal("prefill s saved per GiB/node", "prefill_s_per_gib", 1.0),
            marginal("… per GiB in all", "prefill_s_per_gib", 1.0 / setting.nodes),
        ),
        values={
            "knee_dram_bytes_per_node": knee.dram_bytes,
            "knee_hit_rate": known[knee].hit_rate,
            "load": load,
            "is_lower_bound": bool(facts.unknown_sharing),
            "marginal": [_step_json(step) for step in steps],
        },
    )


def _sizes(setting: Setting) -> list[int]:
    """Powers of two of GiB, the largest holding a node's part of the working set; in quick plans every other one."""
    ratio, num = (4, _QUICK_SIZES) if setting.is_quick else (2, _SIZES)
    largest = GIB
    while largest * setting.nodes < setting.working_set_bytes:
        largest *= 2
    return sorted({max(largest // ratio**n, GIB) for n in range(num)})


def _knee(runs: list[RunSpec], known: Known) -> RunSpec:
    enough = KNEE_SHARE * max(known[run].hit_rate for run in runs)
    return next(run for run in runs if known[run].hit_rate >= enough)


def _with_ssd(setting: Setting, knee: RunSpec) -> list[RunSpec]:
    if not setting.can_ssd:
        return []
    little = replace(knee, dram_bytes=max(knee.dram_bytes // 4, GIB))
    factors = (1,) if setting.is_quick else (1, 4)
    return [*(replace(little, ssd_bytes=knee.dram_bytes * n) for n in factors), replace(knee, ssd_bytes=knee.dram_bytes * 4)]


def _step(setting: Setting, smaller: RunSpec, larger: RunSpec, known: Known) -> Step:
    a, b = known[smaller], known[larger]
    gib = (larger.dram_bytes - smaller.dram_bytes) / GIB
    saved_s = (a.prefill_s_per_request - b.prefill_s_per_request) * b.requests
    return Step(smaller, larger, (b.hit_rate - a.hit_rate) * 100 / gib, saved_s / gib)


def _step_json(step: Step) -> Json:
    return {
        "from_dram_bytes_per_node": step.smaller.dram_bytes,
        "to_dram_bytes_per_node": step.larger.dram_bytes,
        "hit_points_per_gib_per_node": step.hit_points_per_gib,
        "prefill_s_saved_per_gib_per_node": step.prefill_s_per_gib,
        "prefill_s_saved_per_gib_in_all": step.prefill_s_per_gib / step.larger.nodes,
    }


def _dram_text(runs: list[RunSpec], knee: RunSpec, by_larger: dict[RunSpec, Step], known: Known) -> str:
    largest = runs[-1]
    found = f"a hit rate of {percent(known[knee].hit_rate)}"
    if knee == largest:
        text = f"{_amount(knee)}, the trace's whole working set, gives {found}"
        if len(runs) > 1:
            text += f", {size(runs[-2].dram_bytes)} {percent(known[runs[-2]].hit_rate)}"
    else:
        text = f"{_amount(knee)} gives {found}, and {size(largest.dram_bytes)} no more than {percent(known[largest].hit_rate)}"
    if knee in by_larger:
        text += f". The last GiB per node saves {_saved(by_larger[knee])}"
    if knee != largest:
        text += f"; the next one would save {_saved(by_larger[runs[runs.index(knee) + 1]])}"
    return f"{text}."


def _amount(run: RunSpec) -> str:
    return f"{size(run.dram_bytes)} of DRAM per node ({size(run.dram_bytes * run.nodes)} in all)"


def _saved(step: Step) -> str:
    """Of a whole trace: on all nodes."""
    return f"{max(step.prefill_s_per_gib, 0.0):.2g} s of prefill over the trace"


def _ssd_text(knee: RunSpec, runs: list[RunSpec], known: Known) -> str:
    if not runs:
        return "The hardware's SSD bandwidth is not known, so none was tried."
    *behind_little, behind_knee = runs
    best = max(behind_little, key=lambda run: (known[run].hit_rate, -run.ssd_bytes))
    return (
        f"An SSD of {size(best.ssd_bytes)} behind {size(best.dram_bytes)} of DRAM gives {percent(known[best].hit_rate)}; one of"
        f" {size(behind_knee.ssd_bytes)} behind {size(knee.dram_bytes)} gives {percent(known[behind_knee].hit_rate)}."
    )
