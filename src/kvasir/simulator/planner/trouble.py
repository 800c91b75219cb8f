"""What happens when a node dies, and when the load doubles."""

from __future__ import annotations

from msgspec.structs import replace

from kvasir.report.slo import CAPACITY_SHARE
from kvasir.report.summary import Json
from kvasir.simulator.planner.answer import (
    EVENT,
    LOAD,
    NODES,
    OUTCOME,
    REJECTED,
    Answer,
    answer,
    percent,
    seconds,
    sentences,
)
from kvasir.simulator.planner.asking import Asking, Known
from kvasir.simulator.planner.runs import Event, Figures, RunSpec
from kvasir.simulator.planner.setting import Setting
from kvasir.simulator.planner.sizing import fewest_nodes


def trouble(setting: Setting) -> Asking[Answer]:
    """On the cluster as given and, if that has nodes to spare, on the fewest nodes that serve the target load."""
    needed = yield from fewest_nodes(setting, setting.run)
    sizes = sorted({setting.nodes, min(needed.number or setting.nodes, setting.nodes)}, reverse=True)
    calm = [replace(setting.run, nodes=nodes) for nodes in sizes]
    deaths = [replace(run, event=Event.NODE_DIES) for run in calm if run.nodes > 1]
    surges = [replace(run, event=Event.SURGE) for run in calm]
    doubled = replace(setting.run, load=2 * setting.run.load)
    runs = [*calm, *deaths, *surges, doubled]
    known = yield runs
    return answer(
        "trouble",
        "What if a node dies, or the load doubles?",
        sentences(
            *(_death_text(run, known) for run in deaths),
            "" if deaths else "The only node must not die: nothing is answered after that.",
            f"{_surge_text(surges[0], known)}; with twice the load throughout, {_outcome(known[doubled])}.",
        ),
        runs=runs,
        known=known,
        columns=(
            NODES,
            LOAD,
            EVENT,
            *OUTCOME,
            REJECTED,
            ("recovered after", lambda run, f: _recovered(run, known) if run.event is not Event.NONE else "-"),
        ),
        values={"events": [_event_json(run, known) for run in (*deaths, *surges)]},
    )


def recovery_s(disturbed: Figures, calm: Figures) -> float | None:
    """From the event (a node's death, a surge's end) to the end of the last part of the run that is worse than it may be.

    Worse: under 90 % effective, and under the worst part of the undisturbed run. None if the last part still is.
    """
    limit = min([CAPACITY_SHARE, *(share for share in calm.effective_over_time if share is not None)])
    shares = disturbed.effective_over_time
    bad = [number for number, share in enumerate(shares) if share is not None and share < limit]
    last_s = (bad[-1] + 1) * disturbed.bin_s if bad else 0.0
    return None if bad and bad[-1] == len(shares) - 1 else max(last_s - disturbed.event_s, 0.0)


def _calm(run: RunSpec) -> RunSpec:
    return replace(run, event=Event.NONE)


def _death_text(run: RunSpec, known: Known) -> str:
    what = f"If one of {run.nodes} nodes dies half-way, for good"
    return f"{what}, {_outcome(known[run])} ({_against(run, known)}); {_recovery_text(run, known)}."


def _surge_text(run: RunSpec, known: Known) -> str:
    what = "If the load doubles for the middle fifth of the trace"
    return f"{what}, {_outcome(known[run])}, and {_recovery_text(run, known)}"


def _recovery_text(run: RunSpec, known: Known) -> str:
    if not known[_calm(run)].passes:
        return "these nodes are too few even undisturbed"
    recovered_s = recovery_s(known[run], known[_calm(run)])
    if recovered_s is None:
        return "it does not recover within the trace"
    return f"it has recovered after {seconds(recovered_s)}" if recovered_s else "later arrivals notice nothing"


def _outcome(figures: Figures) -> str:
    rejected = f"{figures.rejected:,} of {figures.requests:,} rejected"
    return f"{percent(figures.effective_requests)} of the requests are answered in time and {rejected}"


def _against(run: RunSpec, known: Known) -> str:
    return f"undisturbed {percent(known[_calm(run)].effective_requests)}"


def _recovered(run: RunSpec, known: Known) -> str:
    recovered_s = recovery_s(known[run], known[_calm(run)])
    return "-" if recovered_s is None else seconds(recovered_s)


def _event_json(run: RunSpec, known: Known) -> Json:
    figures = known[run]
    return {
        "event": run.event.value,
        "nodes": run.nodes,
        "effective_requests": figures.effective_requests,
        "effective_requests_undisturbed": known[_calm(run)].effective_requests,
        "rejected": figures.rejected,
        "recovery_s": recovery_s(figures, known[_calm(run)]),
    }
