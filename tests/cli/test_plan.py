"""`kvasir plan` end to end on small traces: flags in, text, JSON, page and errors out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from kvasir.cli.plan import plan
from kvasir.core.errors import ConfigError, KvasirError, TraceError

TRACE = "synthetic:conversation?requests=60"
TRACE_LONG = "synthetic:conversation?requests=3000"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:17:{n:02d}.5,{1000 + 100 * n},{5 + n}\n" for n in range(40)
)
KEYS = ["disaggregate", "ratio", "memory", "nodes", "trouble", "parking"]

app = typer.Typer()
app.command()(plan)


def run(*arguments: str) -> Result:
    """As from a shell, quick and for a small model."""
    result = CliRunner().invoke(app, [*arguments, "--quick", "--model", "qwen3-8b"])
    if isinstance(result.exception, KvasirError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_trace_and_hardware_are_enough_for_answers_with_their_runs_in_text_json_and_a_page(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    result = run(TRACE, "--hardware", "a800", "--nodes", "2", "--slo-ttft", "2s", "--json", "--html", str(page))
    plan: dict[str, Any] = json.loads(result.stdout)
    assert [answer["key"] for answer in plan["answers"]] == KEYS
    assert (plan["nodes"], plan["requests"], plan["slo"]) == (2, 60, {"ttft_s": 2.0, "tbt_s": 0.1})
    for answer in plan["answers"]:
        assert answer["answer"].endswith(".")
        assert all(0 <= number < len(plan["runs"]) for number in answer["runs"])
    shown = {number for answer in plan["answers"] for number in answer["runs"]}
    assert shown == set(range(len(plan["runs"])))
    assert {"nodes", "load", "layout", "split", "dram_bytes", "effective_requests", "hit_rate"} <= set(plan["runs"][0])
    text = page.read_text()
    assert text.count("<svg") == text.count("</svg>") == 6
    assert all(answer["answer"].split(".")[0] in text.replace("&#x27;", "'") for answer in plan["answers"])


def test_without_nodes_as_many_are_planned_as_the_load_needs_and_a_trace_without_hash_ids_says_so(tmp_path: Path) -> None:
    trace = tmp_path / "azure.csv"
    trace.write_text(AZURE)
    result = run(str(trace), "--hardware", "h800", "--rate", "3", "--jobs", "1")
    assert "note: not in the trace: prefix sharing: no hash_ids" in result.stderr
    assert "Target load: 3 requests/s" in result.stdout
    assert "Cluster: 1 node of h800, qwen3-8b" in result.stdout
    assert "One node cannot be split" in result.stdout
    assert "Not known (prefix sharing: no hash_ids" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TRACE, "--hardware", "h900"), "unknown --hardware 'h900'; known are a800"),
        ((TRACE, "--hardware", "no.toml"), "cannot read no.toml: No such file or directory"),
        ((TRACE, "--hardware", "h800", "--rate", "1", "--speed", "2"), "give one"),
        ((TRACE, "--hardware", "h800", "--rate", "-1"), "--rate must be positive, got -1"),
        ((TRACE, "--hardware", "h800", "--speed", "inf"), "--speed must be positive, got inf"),
        ((TRACE, "--hardware", "h800", "--dram", "much"), "dram: got 'much', expected a size"),
        ((TRACE, "--hardware", "cpu-laptop", "--ssd", "1TB"), "an SSD needs ssd_read and ssd_write"),
        ((TRACE, "--hardware", "h800", "--html", "."), "cannot write .: it is a directory; name a file in it"),
        ((TRACE, "--hardware", "h800", "--html", "/no/such/p.html"), "cannot write /no/such/p.html: no such directory"),
        ((TRACE, "--hardware", "h800", "--slo-tbt", "0ms"), "--slo-tbt must be positive"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        run(*arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_trace_that_cannot_be_read_is_one_line() -> None:
    with pytest.raises(TraceError, match=r"cannot read trace no\.jsonl"):
        run("no.jsonl", "--hardware", "h800")


def test_hardware_can_be_a_file_of_figures(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "h800"\nflops_efficiency = 2.0\n')
    with pytest.raises(ConfigError, match=r"hardware\.flops_efficiency: got 2, expected more than 0 and at most 1"):
        run(TRACE, "--hardware", str(path))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_running_when_it_is_stopped(how: signal.Signals) -> None:
    command = [sys.executable, "-m", "kvasir.cli.main", "plan", TRACE_LONG, "--hardware", "h800", "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True)
    deadline = time.monotonic() + 60
    while not (workers := _workers(process.pid)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no worker was started"
        time.sleep(0.1)
    process.send_signal(how)
    out, err = process.communicate(timeout=30)
    assert process.returncode == (130 if how is signal.SIGINT else -how)
    assert out == ""
    assert err == "" or how is signal.SIGKILL
    while any(map(_is_running, workers)):
        assert time.monotonic() < deadline, f"left running: {workers}"
        time.sleep(0.1)


def _workers(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
