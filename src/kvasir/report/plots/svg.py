"""One matplotlib axes to one inline SVG whose colours are the page's CSS variables."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, GRID, LIMIT = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
SERIES = ("#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14", "#0a0b15")
"""Stand-ins that appear nowhere else in a drawing; `svg_of` writes the CSS variable of each instead."""

_VARIABLES = {INK: "--ink", FAINT: "--faint", GRID: "--grid", LIMIT: "--limit"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "path.simplify": True,
    "path.simplify_threshold": 0.5,
}
_SIZE_INCHES = (6.4, 2.7)


def svg_of(name: str, draw: Callable[[Axes], None]) -> str:
    """What `draw` puts on the axes; `name` keeps the ids of one page's drawings apart. The same drawing, the same text."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": f"kvasir-{name}"}):
        figure = figure_of(draw)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(out.getvalue(), name)


def figure_of(draw: Callable[[Axes], None]) -> Figure:
    """The matplotlib figure itself."""
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    draw(axes)
    return figure


def _for_page(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    label = html.escape(name, quote=True)
    svg = re.sub(r"<svg [^>]*viewBox=\"([^\"]*)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)  # only markers and clip paths are referred to
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return svg
