"""The kinds of plots that a run is told with: a distribution against its limit, values over time, shares of a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from kvasir.report.plots.svg import FAINT, LIMIT, SERIES

Draw = Callable[[Axes], None]
Floats = npt.NDArray[np.float64]
Lines = Mapping[str, Sequence[float]]
"""Name → one value per time."""

_MINUTES_FROM_S = 300.0
_HOURS_FROM_S = 4 * 3600.0
_LOG_FROM = 30.0
"""A distribution whose largest value is this many times its p5 is drawn on a logarithmic axis: nothing is out of sight."""

_LEAST_SHARE = 0.1
"""An axis of shares goes up to at least this, so that a few requests do not look like all of them."""

_MAX_POINTS = 400


def distribution(values: Sequence[float] | Floats, *, limit: float | None, unit: str, limit_name: str = "SLO") -> Draw:
    """The share of requests at or below each value, with the limit as a line and the share that meets it; NaN is left out."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    ordered = ordered[~np.isnan(ordered)]

    def draw(axes: Axes) -> None:
        if not ordered.size:
            _nothing(axes)
            return
        shares = np.arange(1, ordered.size + 1) / ordered.size
        keep = np.unique(np.linspace(0, ordered.size - 1, _MAX_POINTS).astype(int))
        axes.step(ordered[keep], shares[keep], where="post", color=SERIES[0])
        axes.fill_between(ordered[keep], shares[keep], step="post", color=SERIES[0], alpha=0.12, linewidth=0)
        _scale(axes, ordered, limit)
        if limit is not None:
            met = float(np.mean(ordered <= limit))
            axes.axvline(limit, color=LIMIT, linestyle=(0, (4, 3)))
            _above(axes, limit, f"{limit_name} {limit:g} {unit}: {met:.1%} met")
        axes.set_ylim(0.0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(unit)

    return draw


def over_time(times_s: Sequence[float], lines: Lines, *, unit: str) -> Draw:
    """Lines over virtual time, at most as many as there are colours; a line without a name has no legend."""

    def draw(axes: Axes) -> None:
        if _lines(axes, times_s, lines):
            axes.set_ylim(bottom=0.0)
            axes.set_ylabel(unit)

    return draw


def shares_over_time(times_s: Sequence[float], lines: Lines) -> Draw:
    """As `over_time`, in percent; at most 100 % and at least a tenth of that are in sight."""

    def draw(axes: Axes) -> None:
        if _lines(axes, times_s, lines):
            highest = max(max(values, default=0.0) for values in lines.values())
            axes.set_ylim(0.0, min(1.0, max(_LEAST_SHARE, 1.2 * highest)))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    return draw


def stacked(times_s: Sequence[float], parts: Lines, *, unit: str) -> Draw:
    """Parts of a whole over virtual time, one on the other."""
    kept = [(colour, name, values) for colour, (name, values) in zip(SERIES, parts.items(), strict=False) if any(values)]

    def draw(axes: Axes) -> None:
        if not times_s or not kept:
            _nothing(axes)
            return
        times = _clock(axes, times_s)
        floor = np.zeros(len(times))
        for colour, name, values in kept:
            top = floor + np.asarray(values, dtype=np.float64)
            axes.fill_between(times, floor, top, step="post", color=colour, alpha=0.75, linewidth=0, label=name)
            floor = top
        axes.set_ylim(0.0, float(floor.max()) * 1.02)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylabel(unit)
        _legend(axes, len(kept))

    return draw


def _lines(axes: Axes, times_s: Sequence[float], lines: Lines) -> bool:
    """Draws the lines; False if there are none."""
    if not times_s or not lines:
        _nothing(axes)
        return False
    times = _clock(axes, times_s)
    for colour, (name, values) in zip(SERIES, lines.items(), strict=False):
        axes.plot(times, np.asarray(values, dtype=np.float64), color=colour, label=name)
    if any(lines):
        _legend(axes, len(lines))
    return True


def _scale(axes: Axes, ordered: Floats, limit: float | None) -> None:
    """Linear from 0, or logarithmic for values of many sizes; the limit is always in sight."""
    high = 1.05 * max(float(ordered[-1]), limit or 0.0, 1e-9)
    low = max(float(np.quantile(ordered, 0.005)), 1e-3)
    if ordered[-1] <= _LOG_FROM * max(np.quantile(ordered, 0.05), 1e-9):
        axes.set_xlim(0.0, high)
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_xlim(0.8 * min(low, limit or low), 1.2 * high)


def _clock(axes: Axes, times_s: Sequence[float]) -> Floats:
    """Times in the unit that suits their span, which is written under the axis."""
    times = np.asarray(times_s, dtype=np.float64)
    span_s = float(times[-1])
    divisor, unit = (
        (3600.0, "hours") if span_s > _HOURS_FROM_S else (60.0, "minutes") if span_s > _MINUTES_FROM_S else (1.0, "seconds")
    )
    axes.set_xlabel(unit)
    axes.margins(x=0.01)
    scaled: Floats = times / divisor
    return scaled


def _above(axes: Axes, x: float, text: str) -> None:
    """Text over the top end of a vertical line, where no curve goes, turned to the side that has room."""
    low, high = axes.get_xlim()
    share = np.log(x / low) / np.log(high / low) if axes.get_xscale() == "log" else (x - low) / (high - low)
    axes.annotate(
        text,
        (x, 1.0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right" if share > 0.5 else "left",
        color=LIMIT,
    )


def _legend(axes: Axes, num_lines: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=num_lines, borderaxespad=0.0, handlelength=1.4)


def _nothing(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "nothing to show", ha="center", va="center", color=FAINT, transform=axes.transAxes)
