"""What a plan hands back: its answers as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import cast

import msgspec

from kvasir.cli.simulate.outcome import slo_text
from kvasir.core.request import Slo
from kvasir.core.units import format_duration
from kvasir.report.slo import ScaledSlo
from kvasir.report.summary import Json
from kvasir.simulator.planner import Advice, Answer, RunSpec
from kvasir.simulator.planner.answer import count, size

_WIDTH = 110


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished plan and its conditions. `wall_s` is all simulations' time together, as a clock on the wall sees it."""

    advice: Advice
    trace_name: str
    hardware: str
    model: str
    slo: Slo | ScaledSlo
    speed: float
    seed: int
    wall_s: float
    notes: tuple[str, ...] = ()
    command: str = ""

    def text(self) -> str:
        """For people: each question, its answer, and the runs behind it."""
        lines = [f"{name}: {value}" for name, value in self.conditions()]
        for number, answer in enumerate(self.advice.answers, start=1):
            lines += ["", f"{number}. {answer.question}", fill(answer.text, _WIDTH), *_aligned(answer)]
        return "\n".join(lines)

    def conditions(self) -> Iterator[tuple[str, str]]:
        """What the answers depend on."""
        setting = self.advice.setting
        facts = setting.facts
        yield "Trace", f"{self.trace_name}, {facts.num_requests:,} requests in {facts.span_s:,.0f} s"
        yield "Target load", f"{setting.rate:.3g} requests/s, the trace at {self.speed:.3g}x"
        yield "Cluster", f"{count(setting.nodes, 'node')} of {self.hardware}, {self.model}, {self._memory()}"
        yield "SLO", f"{slo_text(self.slo)}; a load is served if 90 % of the requests and of the input tokens are within it"
        yield "Seed", str(self.seed)
        yield "Capacities", f"are found to {2 ** (1 / setting.steps_per_octave) - 1:.0%}"
        yield "Runs", f"{len(self.advice.runs)} simulations in {format_duration(self.wall_s)}"

    def _memory(self) -> str:
        setting = self.advice.setting
        ssd = f" and {size(setting.ssd_bytes)} of SSD" if setting.ssd_bytes else ""
        return f"{size(setting.dram_bytes)} of DRAM{ssd} each"

    def to_json(self) -> dict[str, Json]:
        """Answers refer to `runs` by index."""
        index = {run: number for number, run in enumerate(self.advice.runs)}
        setting = self.advice.setting
        return {
            "trace": self.trace_name,
            "requests": setting.facts.num_requests,
            "trace_span_s": setting.facts.span_s,
            "unknown": [text for text in (setting.facts.unknown_sharing, setting.facts.unknown_times) if text],
            "hardware": self.hardware,
            "model": self.model,
            "nodes": setting.nodes,
            "dram_bytes_per_node": setting.dram_bytes,
            "ssd_bytes_per_node": setting.ssd_bytes,
            "slo": cast(Json, msgspec.to_builtins(self.slo)),
            "target_requests_per_s": setting.rate,
            "speed": self.speed,
            "seed": self.seed,
            "notes": list(self.notes),
            "answers": [_answer_json(answer, index) for answer in self.advice.answers],
            "runs": [_run_json(run, figures) for run, figures in self.advice.runs.items()],
            "wall_s": self.wall_s,
        }


def _answer_json(answer: Answer, index: dict[RunSpec, int]) -> Json:
    return {
        "key": answer.key,
        "question": answer.question,
        "answer": answer.text,
        "values": answer.values,
        "runs": [index[run] for run in answer.runs],
    }


def _run_json(run: RunSpec, figures: msgspec.Struct) -> Json:
    return {"split": run.split, **msgspec.to_builtins(run), **msgspec.to_builtins(figures)}


def _aligned(answer: Answer) -> Iterator[str]:
    """The runs in columns; the first is text, the others are figures."""
    if not answer.rows:
        return
    rows: Sequence[Sequence[str]] = [answer.header, *answer.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "   " + "  ".join((first.ljust(widths[0]), *cells))
