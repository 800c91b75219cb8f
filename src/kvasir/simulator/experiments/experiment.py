"""What an experiment is: simulations that do not depend on each other, and the figure that their results make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvasir.core.request import Slo
from kvasir.report.plots.draw import Draw
from kvasir.simulator.clusters import load_cluster, with_split
from kvasir.simulator.spec import ClusterSpec
from kvasir.workload.trace import Trace

Result = TypeVar("Result")
Cell = float | str | None

PAPER_SLO = Slo(ttft_s=30.0, tbt_s=0.1)
"""The objectives of most of the paper's figures (FAST'25, section 5.2)."""


@dataclass(frozen=True, slots=True)
class Bed:
    """What experiments share: a trace of requests, and the paper's 16 nodes of 8 x A800 with LLaMA3-70B."""

    trace: Trace

    def cluster(self, split: str = "8P8D") -> ClusterSpec:
        return with_split(load_cluster("paper-16"), split)


@dataclass(frozen=True, slots=True)
class Column:
    """A figure's values under each other; `form` formats one, None is a value that does not exist."""

    name: str
    values: Sequence[Cell]
    form: str = "{}"

    def texts(self) -> list[str]:
        return ["-" if value is None else self.form.format(value) for value in self.values]


@dataclass(frozen=True, slots=True)
class Grid:
    """Columns of one length, the paper's own values among them; the first names the rows."""

    title: str
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """Results beside the paper's: `plots` by title, and in `deviation` what differs from the paper and why."""

    grids: tuple[Grid, ...]
    plots: Mapping[str, Draw]
    deviation: str


@dataclass(frozen=True, slots=True)
class Experiment(Generic[Result]):
    """A row of the table. `tasks` are picklable, need nothing from each other, and `figure` gets their results by name.

    `setting` is what was simulated, `paper` where the original is.
    """

    name: str
    title: str
    paper: str
    setting: str
    tasks: Callable[[Bed], Mapping[str, Callable[[], Result]]]
    figure: Callable[[Bed, Mapping[str, Result]], Figure]
