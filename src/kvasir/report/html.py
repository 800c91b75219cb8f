"""A report as one HTML file that needs nothing else: figures, conditions, plots and tables, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, slots=True)
class Headline:
    """A figure to be read first, with a word of explanation below it; `is_good` colours it, None does not."""

    label: str
    value: str
    note: str = ""
    is_good: bool | None = None


@dataclass(frozen=True, slots=True)
class Plot:
    """An inline SVG under a heading, and what to look at."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a header; every cell is text, columns after the first are figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    if_empty: str = "None."


@dataclass(frozen=True, slots=True)
class Page:
    """Everything on the page, in its order. All texts are escaped; only a plot's SVG goes in as it is."""

    title: str
    subtitle: str
    headlines: tuple[Headline, ...]
    notes: tuple[str, ...] = ()
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    conditions: tuple[tuple[str, str], ...] = ()
    command: str = ""
    footer: str = "Made by kvasir. Times are virtual: predicted seconds, not measured ones."


def render(page: Page) -> str:
    """The file's text."""
    return "\n".join(_document(page)) + "\n"


def _document(page: Page) -> Iterator[str]:
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(page.title)}</title><style>{_CSS}</style></head><body><main>"
    yield f"<header><h1>{escape(page.title)}</h1><p>{escape(page.subtitle)}</p></header>"
    yield from _section("figures", map(_headline, page.headlines))
    yield from (f'<p class="note">{escape(note)}</p>' for note in page.notes)
    yield from _section("plots", map(_plot, page.plots))
    yield from _section("tables", map(_table, page.tables))
    yield "<h2>Conditions</h2><dl>"
    yield from (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in page.conditions)
    yield "</dl>"
    if page.command:
        yield f"<h2>Again</h2><pre><code>{escape(page.command)}</code></pre>"
    yield f"<footer>{escape(page.footer)}</footer></main></body></html>"


def _section(name: str, parts: Iterable[str]) -> Iterator[str]:
    yield f'<section class="{name}">'
    yield from parts
    yield "</section>"


def _headline(h: Headline) -> str:
    mark = "" if h.is_good is None else " good" if h.is_good else " bad"
    return (
        f'<div class="figure{mark}"><span>{escape(h.label)}</span><strong>{escape(h.value)}</strong>'
        f"<small>{escape(h.note)}</small></div>"
    )


def _plot(plot: Plot) -> str:
    return f"<figure><h2>{escape(plot.title)}</h2>{plot.svg}<figcaption>{escape(plot.caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    if not table.rows:
        return f"<div><h2>{escape(table.title)}</h2><p>{escape(table.if_empty)}</p></div>"
    header = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<div><h2>{escape(table.title)}</h2><div class="wide"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


_CSS = """
:root{color-scheme:light dark;--font:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--paper:#fbfbfa;--card:#fff;--ink:#1d2026;--faint:#626873;--grid:#dcdfe4;--limit:#b3261e;--good:#1b7a43;--bad:#b3261e;
--series-1:#2862c4;--series-2:#d1701a;--series-3:#1b8a6b;--series-4:#8a4bbd;--series-5:#8b8f1f}
@media (prefers-color-scheme:dark){:root{--paper:#15171b;--card:#1d2025;--ink:#e6e8ec;--faint:#9aa1ad;--grid:#363b44;
--limit:#ff8a80;--good:#6fcf97;--bad:#ff8a80;--series-1:#7aa7ff;--series-2:#ffae66;--series-3:#5cd0aa;--series-4:#c79bf2;
--series-5:#d6d96a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 var(--font)}
main{max-width:1120px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:25px;line-height:1.25;margin:0}h2{font-size:16px;margin:0 0 6px}main>h2{margin:28px 0 8px}
header p{margin:4px 0 0;color:var(--faint)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin:20px 0}
.figure{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:12px 14px;
display:flex;flex-direction:column}
.figure span,.figure small{color:var(--faint);font-size:13px}
.figure strong{font-size:23px;font-weight:600;font-variant-numeric:tabular-nums}
.good strong{color:var(--good)}.bad strong{color:var(--bad)}
.note{margin:8px 0;padding:8px 12px;border-left:3px solid var(--limit);background:var(--card)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px;margin:20px 0}
figure,.tables>div{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:14px 16px}
figure svg{display:block;width:100%;height:auto}figcaption{color:var(--faint);font-size:13px;margin-top:6px}
.tables{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px;align-items:start}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:4px 8px;border-bottom:1px solid var(--grid)}
th:first-child,td:first-child{text-align:left;padding-left:0}th{color:var(--faint);font-weight:500}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:0}dt{color:var(--faint)}
dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:12px;overflow-x:auto;white-space:pre-wrap}
footer{margin-top:32px;color:var(--faint);font-size:13px}
@media print{body{background:#fff}figure,.figure{break-inside:avoid}}
""".strip()
