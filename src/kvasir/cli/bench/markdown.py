"""Figures of experiments as one Markdown page, and their plots as SVG files that need no page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvasir.report.plots.svg import svg_of
from kvasir.simulator.experiments import Experiment, Figure, Grid

Figures = Sequence[tuple[Experiment[Any], Figure]]

_COLOURS = {
    "--ink": "#1d2026",
    "--faint": "#626873",
    "--grid": "#dcdfe4",
    "--limit": "#b3261e",
    "--series-1": "#2862c4",
    "--series-2": "#d1701a",
    "--series-3": "#1b8a6b",
    "--series-4": "#8a4bbd",
    "--series-5": "#8b8f1f",
    "--font": "system-ui, sans-serif",
}
"""The light palette of the HTML report: a file of its own has no page to take it from."""

_SCALE = 1.6
"""Pixels per unit of a drawing."""

_INTRO = """\
# The paper's results, redrawn

Each figure of the Mooncake papers (FAST'25; arXiv 2407.00079) that a scheduler can reproduce, simulated here with the objects
of `kvasir serve`, beside the paper's value. The cluster is `paper-16` (16 nodes of 8 x A800, LLaMA3-70B, 3M tokens of DRAM a
node, 640 Gbps) with the costs of a simple model; `docs/howto/simulate.md` says what is modelled. Objectives are TTFT 30 s and
TBT 100 ms if nothing else is said. An effective request is one that meets both. Times are virtual: the same on every machine.
"""


def page(figures: Figures, *, conditions: Mapping[str, str]) -> str:
    """The whole page; plots are linked as `paper/NAME.svg`."""
    return "\n".join([_INTRO, *(f"* {name}: {text}" for name, text in conditions.items()), "", *_sections(figures)])


def drawings(figures: Figures) -> dict[str, str]:
    """File name → SVG."""
    return {
        _file_name(experiment, number): standalone(svg_of(f"{experiment.name}-{number}", draw))
        for experiment, figure in figures
        for number, draw in enumerate(figure.plots.values(), start=1)
    }


def _sections(figures: Figures) -> Iterator[str]:
    for experiment, figure in figures:
        yield f"## {experiment.title} ({experiment.paper})\n"
        yield f"{experiment.setting}\n"
        for number, title in enumerate(figure.plots, start=1):
            yield f"**{title}**\n\n![{title}](paper/{_file_name(experiment, number)})\n"
        yield from map(_table, figure.grids)
        yield f"{figure.deviation}\n"


def _file_name(experiment: Experiment[Any], number: int) -> str:
    return f"{experiment.name}-{number}.svg"


def _table(grid: Grid) -> str:
    rows = zip(*(column.texts() for column in grid.columns), strict=True)
    lines = [
        _row([column.name for column in grid.columns]),
        _row(["---", *["---:"] * (len(grid.columns) - 1)]),
        *map(_row, rows),
    ]
    return "\n".join([*([f"{grid.title}:\n"] if grid.title else []), *lines, ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def standalone(svg: str) -> str:
    """An inline SVG of report/plots as a file of its own: with its own colours, on white."""
    for variable, value in _COLOURS.items():
        svg = svg.replace(f"var({variable})", value)
    left, top, width, height = (float(number) for number in re.findall(r"[-\d.]+", _view_box(svg)))
    size = f'width="{width * _SCALE:.0f}" height="{height * _SCALE:.0f}"'
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    paper = f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" fill="#ffffff"/>'
    return re.sub(r"<svg ([^>]*)>", rf"<svg {namespaces} {size} \1>{paper}", svg, count=1)


def _view_box(svg: str) -> str:
    match = re.search(r'viewBox="([^"]*)"', svg)
    assert match is not None, "svg_of always gives one"
    return match[1]
