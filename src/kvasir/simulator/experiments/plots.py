"""The kinds of plots that the paper's figures need: curves over a swept value, and bars with the paper's own beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from kvasir.report.plots.draw import Draw
from kvasir.report.plots.svg import FAINT, INK, SERIES

COLOUR = dict(zip(("kvasir", "mooncake", "local", "colocated", "colocated-chunked"), SERIES, strict=True))
"""A policy has the same colour in every figure."""

_LEGEND_COLUMNS = 3
"""More do not fit in a plot's width."""

_LABEL_CHARACTERS = 13
"""Longer names go on under themselves."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one system. Those of the paper are open diamonds on a dotted line."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    is_paper: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis says; `ticks` are where the points are if nothing else is said."""

    label: str
    is_log: bool = False
    is_share: bool = False
    top: float | None = None
    ticks: tuple[float, ...] = ()


def curves(lines: Sequence[Curve], x: Axis, y: Axis) -> Draw:
    """Lines with a marker at every point that was simulated."""

    def draw(axes: Axes) -> None:
        for line in lines:
            how = {"marker": "D", "markerfacecolor": "none", "linestyle": ":"} if line.is_paper else {"marker": "o"}
            axes.plot(line.xs, line.ys, color=line.colour, label=line.name, markersize=4.5, **how)  # type: ignore[arg-type]
        if x.is_log:
            axes.set_xscale("log")
        axes.set_xticks(x.ticks or sorted({float(value) for line in lines for value in line.xs}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(x.label)
        _scale_y(axes, y)
        _legend(axes, len(lines))

    return draw


def bars(names: Sequence[str], values: Sequence[float], paper: Sequence[float | None], y: Axis) -> Draw:
    """One bar a name, its value below it, and the paper's value as an open diamond."""

    def draw(axes: Axes) -> None:
        places = np.arange(len(names))
        axes.bar(places, values, width=0.55, color=[COLOUR.get(name, FAINT) for name in names])
        known = [(place, value) for place, value in zip(places, paper, strict=True) if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), linestyle="none", marker="D", markerfacecolor="none", color=INK, label="paper")
            _legend(axes, 1)
        axes.set_xticks(
            places, [f"{fill(name, _LABEL_CHARACTERS)}\n{_short(value)}" for name, value in zip(names, values, strict=True)]
        )
        axes.grid(visible=False, axis="x")
        _scale_y(axes, y)

    return draw


def labelled(draw: Draw, y_label: str) -> Draw:
    """The same with a label at its y axis."""

    def with_label(axes: Axes) -> None:
        draw(axes)
        axes.set_ylabel(y_label)

    return with_label


def _scale_y(axes: Axes, y: Axis) -> None:
    if y.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0.0, y.top or 1.05 * axes.get_ylim()[1])
    if y.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel(y.label)


def _short(value: float) -> str:
    """Three digits, thousands and millions by letter."""
    for factor, letter in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def _legend(axes: Axes, num_lines: int) -> None:
    columns = min(num_lines, _LEGEND_COLUMNS)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.0, handlelength=1.8)
