"""`kvasir bench paper` end to end on a slice: files, JSON, several processes, errors and interrupts."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import subprocess
import sys
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner, Result

from kvasir.cli.bench import bench
from kvasir.cli.bench.processes import results_of
from kvasir.core.errors import ConfigError, KvasirError

TRACE = "synthetic:conversation?requests=60"
CHEAP = ("--trace", TRACE, "--only", "placement", "--only", "hit-rate")
CHEAPEST = ("--trace", TRACE, "--only", "hit-rate", "--jobs", "1")

app = typer.Typer()
app.add_typer(bench, name="bench")


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["bench", "paper", *arguments])
    if isinstance(result.exception, KvasirError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def figures(*arguments: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return result


def test_json_has_the_chosen_figures_with_the_papers_values_in_them() -> None:
    result = figures(*CHEAP, "--jobs", "1")
    assert list(result) == ["hit-rate", "placement"]
    columns = {c["name"]: c["values"] for c in result["placement"]["tables"][0]["columns"]}
    assert columns["policy"][:4] == ["random", "least-loaded", "local", "mooncake"]
    assert columns["paper"] == [19.65, 5.27, 3.58, 3.07, None, None]
    assert all(value > 0 for value in columns["mean TTFT, s"])


def test_two_processes_give_the_figures_of_one() -> None:
    assert figures(*CHEAP, "--jobs", "2") == figures(*CHEAP, "--jobs", "1")


def test_files_are_a_page_and_the_drawings_that_it_shows(tmp_path: Path) -> None:
    run(*CHEAP, "--jobs", "1", "--out", str(tmp_path))
    page = (tmp_path / "paper.md").read_text("utf-8")
    linked = set(re.findall(r"\]\((paper/[^)]*)\)", page))
    assert linked == {f"paper/{path.name}" for path in (tmp_path / "paper").iterdir()}
    assert len(linked) == 2
    for name in linked:
        root = ElementTree.fromstring((tmp_path / name).read_text("utf-8"))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in (tmp_path / name).read_text("utf-8")
    assert "60 requests" in page
    assert "| random |" in page


def test_a_page_that_cannot_be_written_is_printed_and_then_the_error(tmp_path: Path) -> None:
    (tmp_path / "paper.md").mkdir()
    result = CliRunner().invoke(app, ["bench", "paper", *CHEAPEST, "--out", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == f"cannot write {tmp_path / 'paper.md'}: Is a directory"
    assert result.stdout.startswith("# The paper's results, redrawn")


def test_a_page_does_not_say_where_the_trace_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,4808,10\n2023-11-16 18:17:04,318,8\n")
    arguments = (f"--trace={trace}", "--only", "hit-rate", "--jobs", "1")
    monkeypatch.setattr("sys.argv", ["kvasir", "bench", "paper", *arguments])
    page = run(*arguments).stdout
    assert "* Command: `kvasir bench paper --trace=t.csv --only hit-rate --jobs 1`" in page
    assert str(tmp_path) not in page


def test_the_same_figures_are_drawn_alike(tmp_path: Path) -> None:
    drawn = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run(*CHEAPEST, "--out", str(tmp_path / name))
        drawn.append((tmp_path / name / "paper" / "hit-rate-1.svg").read_bytes())
    assert drawn[0] == drawn[1]


def test_quick_takes_a_slice() -> None:
    page = run("--trace", "synthetic:conversation?requests=900", "--quick", "--only", "hit-rate", "--jobs", "1").stdout
    assert "300 requests" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "fig5"), "unknown experiment 'fig5'; known are"),
        (("--out", "/does/not/exist"), "no such directory"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_simulated(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run("--trace", TRACE, *arguments)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_task_that_fails_ends_all(jobs: int) -> None:
    tasks = {"good": partial(truediv, 1, 2), "bad": partial(truediv, 1, 0)}
    with pytest.raises(ZeroDivisionError):
        results_of(tasks, jobs, lambda done, key: None)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_are_by_key_in_the_order_of_the_tasks(jobs: int) -> None:
    tasks = {number: partial(truediv, number, 2) for number in (3, 1, 2)}
    heard: list[int] = []
    results = results_of(tasks, jobs, lambda done, key: heard.append(done))
    assert list(results.items()) == [(3, 1.5), (1, 0.5), (2, 1.0)]
    assert heard == [1, 2, 3]


def test_an_interrupt_is_quiet_and_at_once() -> None:
    command = [sys.executable, "-m", "kvasir.cli.main", "bench", "paper", "--only", "effective-capacity", "--jobs", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("note: ")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
