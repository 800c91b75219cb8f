"""What each answer's runs look like: curves over load, split, memory, nodes and time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from kvasir.report.plots.draw import Draw
from kvasir.report.plots.svg import LIMIT, SERIES
from kvasir.report.slo import CAPACITY_SHARE
from kvasir.simulator.planner import Answer, Event, Figures, Layout, Part, RunSpec

Runs = Mapping[RunSpec, Figures]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Curves:
    """Lines by name; `limit` is a share to be reached. With `x_text`, which writes a tick, x is logarithmic."""

    x_name: str
    y_name: str
    lines: Mapping[str, list[Point]]
    limit: float | None = CAPACITY_SHARE
    x_text: Callable[[float], str] | None = None


def curves(what: Curves) -> Draw:
    """Shares in percent over anything; a line of one point is a dot."""

    def draw(axes: Axes) -> None:
        for colour, (name, points) in zip(SERIES, what.lines.items(), strict=False):
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, color=colour, label=name, marker="o", markersize=3.5)
        if what.limit is not None:
            axes.axhline(what.limit, color=LIMIT, linestyle=(0, (4, 3)), linewidth=1.0)
        if what.x_text is None:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=what.x_name != "minutes"))
        else:
            _powers_of_two(axes, what)
        axes.set_ylim(bottom=0.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(what.x_name)
        axes.set_ylabel(what.y_name)
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(what.lines), borderaxespad=0.0, handlelength=1.4)

    return draw


def _powers_of_two(axes: Axes, what: Curves) -> None:
    xs = [x for points in what.lines.values() for x, _ in points]
    ticks = [2.0**n for n in range(-20, 60) if min(xs) * 0.9 <= 2.0**n <= max(xs) * 1.1]
    text = what.x_text
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: text(x) if text else ""))


def _over_load(answer: Answer, runs: Runs) -> Curves:
    lines = _grouped(answer, lambda run: run.name, lambda run: (run.load, runs[run].effective))
    return Curves("load, times the target", "effective", lines, x_text=lambda load: f"{load:g}x")


def _over_split(answer: Answer, runs: Runs) -> Curves:
    splits = [(float(run.num_prefill), runs[run].effective) for run in answer.runs if run.layout is Layout.FIXED]
    elastic = next(runs[run].effective for run in answer.runs if run.layout is Layout.ELASTIC)
    ends = [(x, elastic) for x in (min(splits)[0], max(splits)[0])]
    return Curves("prefill nodes, of all", "effective", {"fixed": splits, "elastic": ends})


def _over_memory(answer: Answer, runs: Runs) -> Curves:
    def name(run: RunSpec) -> str:
        return f"and an SSD, {_gib(run.ssd_bytes / 2**30)}" if run.ssd_bytes else "DRAM alone"

    lines = _grouped(answer, name, lambda run: (run.dram_bytes / 2**30, runs[run].hit_rate))
    return Curves("DRAM per node", "hit rate", lines, limit=None, x_text=_gib)


def _over_nodes(answer: Answer, runs: Runs) -> Curves:
    def name(run: RunSpec) -> str:
        return "quietest eighth" if run.part is Part.QUIET else f"load {run.load:g}x"

    return Curves("nodes", "effective", _grouped(answer, name, lambda run: (float(run.nodes), runs[run].effective)))


def _over_time(answer: Answer, runs: Runs) -> Curves:
    most = max(run.nodes for run in answer.runs)
    names = {Event.NONE: "undisturbed", Event.NODE_DIES: "a node dies", Event.SURGE: "a surge"}
    return Curves(
        "minutes",
        "effective requests",
        {
            names[run.event]: [
                ((number + 0.5) * runs[run].bin_s / 60, share)
                for number, share in enumerate(runs[run].effective_over_time)
                if share is not None
            ]
            for run in answer.runs
            if run.nodes == most and run.load == 1
        },
    )


PLOTS: dict[str, Callable[[Answer, Runs], Curves]] = {
    "disaggregate": _over_load,
    "ratio": _over_split,
    "memory": _over_memory,
    "nodes": _over_nodes,
    "trouble": _over_time,
    "parking": _over_nodes,
}
"""By an answer's key."""


def _grouped(answer: Answer, name: Callable[[RunSpec], str], point: Callable[[RunSpec], Point]) -> dict[str, list[Point]]:
    lines: dict[str, list[Point]] = defaultdict(list)
    for run in answer.runs:
        lines[name(run)].append(point(run))
    return lines


def _gib(gib: float) -> str:
    return f"{gib / 1024:g} TiB" if gib >= 1024 else f"{gib:g} GiB"
