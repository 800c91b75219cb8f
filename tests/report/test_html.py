"""The HTML report: one file that needs nothing else, escapes what it shows, and draws in the page's colours."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from kvasir.report.html import Headline, Page, Plot, Table, render
from kvasir.report.plots.draw import Draw, distribution, over_time, shares_over_time, stacked
from kvasir.report.plots.svg import figure_of, svg_of

VOID = {"meta", "path", "use", "rect", "line", "br"}
TIMES = [0.0, 30.0, 60.0]
DRAWS: dict[str, Draw] = {
    "distribution": distribution([0.1, 0.5, 2.0, 40.0], limit=30.0, unit="s"),
    "wide": distribution([0.001 * 1.1**n for n in range(120)], limit=30.0, unit="s"),
    "equal": distribution([1.0, 1.0], limit=None, unit="s"),
    "zero": distribution([0.0], limit=1.0, unit="s"),
    "unmeasured": distribution([math.nan, 1.0], limit=1.0, unit="s"),
    "empty": distribution([], limit=1.0, unit="s"),
    "over-time": over_time(TIMES, {"a": [1, 2, 3], "b": [3, 2, 1]}, unit="requests"),
    "share": shares_over_time(TIMES, {"": [0.0, 0.5, 1.0]}),
    "no-lines": over_time(TIMES, {}, unit="requests"),
    "stacked": stacked(TIMES, {"prefill": [8, 8, 8], "decode": [8, 8, 8], "mixed": [0, 0, 0]}, unit="instances"),
    "no-samples": stacked([], {}, unit="instances"),
}


class Balanced(HTMLParser):
    """Checks that every element that opens also closes, and collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        assert tag not in ("script", "link", "iframe", "img")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def page(**parts: object) -> str:
    values: dict[str, object] = {"title": "t", "subtitle": "s", "headlines": (), **parts}
    return render(Page(**values))  # type: ignore[arg-type]  # the tests give the fields that they are about


def test_a_page_is_one_balanced_file_that_fetches_nothing() -> None:
    plots = tuple(Plot(name, svg_of(name, draw)) for name, draw in DRAWS.items())
    text = page(plots=plots, tables=(Table("x", ("a", "b"), (("1", "2"),)),), headlines=(Headline("h", "1"),), command="kvasir")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert all(target.startswith("#") for target in parser.fetched)
    assert "http" not in re.sub(r'xmlns[^"]*"[^"]*"', "", text)


def test_what_is_shown_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    text = page(
        title=evil,
        subtitle=evil,
        headlines=(Headline(evil, evil, evil),),
        notes=(evil,),
        plots=(Plot(evil, "", evil),),
        tables=(Table(evil, (evil,), ((evil,),), evil), Table(evil, (), (), evil)),
        conditions=((evil, evil),),
        command=evil,
    )
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 17


def test_an_empty_table_says_so() -> None:
    assert "Nothing was rejected." in page(tables=(Table("r", ("reason",), (), "Nothing was rejected."),))


def test_good_and_bad_figures_are_marked() -> None:
    text = page(headlines=(Headline("a", "95 %", is_good=True), Headline("b", "5 %", is_good=False), Headline("c", "7")))
    assert [text.count(f'class="figure{mark}"') for mark in (" good", " bad", "")] == [1, 1, 1]


def test_both_colour_schemes_define_every_colour_that_plots_use() -> None:
    text = page(plots=tuple(Plot(name, svg_of(name, draw)) for name, draw in DRAWS.items()))
    light, dark = (set(re.findall(r"(--[a-z0-9-]+):", part)) for part in text.split("@media (prefers-color-scheme:dark)"))
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", text))
    assert used <= light
    assert used - {"--font"} <= dark


@pytest.mark.parametrize("name", DRAWS)
def test_a_plot_has_no_colour_of_its_own_and_is_the_same_each_time(name: str) -> None:
    svg = svg_of(name, DRAWS[name])
    assert svg == svg_of(name, DRAWS[name])
    assert not re.search(r"#[0-9a-f]{6}\b(?!fe)", re.sub(r"[#\"(][mp][0-9a-f]{10}", "", svg))


def test_drawings_of_one_page_do_not_share_ids() -> None:
    first, second = (set(re.findall(r'id="([^"]+)"', svg_of(name, DRAWS["distribution"]))) for name in ("a", "b"))
    assert first
    assert not first & second


def test_a_limit_is_in_sight_with_the_share_that_meets_it() -> None:
    axes = figure_of(DRAWS["distribution"]).axes[0]
    assert axes.get_xlim()[0] < 30.0 < axes.get_xlim()[1]
    assert [text.get_text() for text in axes.texts] == ["SLO 30 s: 75.0% met"]


def test_a_curve_is_wholly_in_sight() -> None:
    for name in ("distribution", "wide", "over-time", "share"):
        axes = figure_of(DRAWS[name]).axes[0]
        highest = max(float(np.max(np.asarray(line.get_xdata(), dtype=np.float64))) for line in axes.lines)
        assert axes.get_xlim()[1] >= highest


def test_a_role_keeps_its_colour_when_another_is_absent() -> None:
    both = figure_of(stacked(TIMES, {"prefill": [1, 1, 1], "decode": [1, 1, 1]}, unit="")).axes[0]
    one = figure_of(stacked(TIMES, {"prefill": [0, 0, 0], "decode": [1, 1, 1]}, unit="")).axes[0]
    assert both.collections[1].get_facecolor().tolist() == one.collections[0].get_facecolor().tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(("span_s", "unit"), [(200.0, "seconds"), (3600.0, "minutes"), (86_400.0, "hours")])
def test_time_is_in_the_unit_that_suits_it(span_s: float, unit: str) -> None:
    assert figure_of(over_time([0.0, span_s], {"": [0.0, 1.0]}, unit="")).axes[0].get_xlabel() == unit
