"""`kvasir simulate` end to end on small traces: flags in, table, JSON, page and errors out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from kvasir.cli.simulate import simulate
from kvasir.cli.simulate.inputs import faults_for, find_cluster, load_trace, objectives
from kvasir.core.errors import ConfigError, KvasirError, TraceError
from kvasir.core.request import Role, Slo
from kvasir.report.slo import ScaledSlo

TRACE = "synthetic:conversation?requests=60"
CLUSTER = """
name = "mine"
model = "qwen3-8b"
hardware = "h800"
nodes = 2
split = "1P1D"
dram = "200GB"
"""
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.03,3180,8\n"

app = typer.Typer()
app.command()(simulate)


def run(*arguments: str) -> Result:
    """As from a shell, least-loaded unless told otherwise: the fastest policy."""
    policy = () if "--policy" in arguments else ("--policy", "least-loaded")
    result = CliRunner().invoke(app, [*arguments, *policy])
    if isinstance(result.exception, KvasirError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def figures(*arguments: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return result


def without_time(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "wall_s"}


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER)
    return str(path)


def test_json_is_one_object_with_the_promised_keys() -> None:
    result = figures(TRACE, "--seed", "3")
    assert (result["requests"], result["policy"], result["cluster"], result["speed"]) == (60, "least-loaded", "paper-16", 1.0)
    assert (result["seed"], result["slo"]) == (3, {"ttft_s": 30.0, "tbt_s": 0.1})
    assert set(result["ttft_s"]) == set(result["tbt_s"]) == {"mean", "p50", "p90", "p99"}
    assert 0.0 <= result["hit_rate"] <= 1.0
    assert 0.0 <= result["effective_input_tokens"] <= 1.0
    assert result["prefill_s_per_request"] > 0
    assert result["wall_s"] > 0
    assert {"rejected", "effective"} <= set(result)
    assert "capacity_speed" not in result


def test_equal_flags_give_equal_figures() -> None:
    assert without_time(figures(TRACE, "--jitter", "3s")) == without_time(figures(TRACE, "--jitter", "3s"))


def test_a_table_is_what_a_person_gets() -> None:
    lines = run(TRACE).stdout.splitlines()
    assert "least-loaded on paper-16, 1x" in lines[0]
    assert any(line.startswith("Effective requests (%):") for line in lines)
    assert any(line.startswith("SLO:") and line.endswith("TTFT 30 s, TBT 100 ms") for line in lines)


def test_kvasir_s_own_policy_runs() -> None:
    assert figures(TRACE, "--policy", "kvasir")["policy"] == "kvasir"


def test_a_faster_trace_takes_longer_to_answer() -> None:
    slow, fast = (figures(TRACE, "--speed", speed) for speed in ("0.5", "20"))
    assert fast["ttft_s"]["mean"] > slow["ttft_s"]["mean"]


def test_a_cluster_file_a_split_and_a_limit_are_used(cluster: str) -> None:
    result = figures(TRACE, "--cluster", cluster, "--split", "2M", "--limit", "7")
    assert (result["cluster"], result["split"], result["requests"]) == ("mine", "2M", 7)


def test_a_part_of_the_policy_can_be_replaced() -> None:
    overloaded = (TRACE, "--speed", "50", "--slo-ttft", "3s")
    assert figures(*overloaded)["rejected"] > 0
    assert figures(*overloaded, "--admission", "off")["rejected"] == 0


def test_eviction_can_be_replaced() -> None:
    assert figures(TRACE, "--eviction", "lfu")["requests"] == 60


@pytest.mark.parametrize("policy", ["colocated", "colocated-chunked"])
def test_a_colocated_policy_makes_every_instance_mixed_unless_told_otherwise(policy: str) -> None:
    assert figures(TRACE, "--policy", policy)["split"] == "16M"
    assert figures(TRACE, "--policy", policy, "--split", "8P8D")["split"] == "8P8D"


@pytest.mark.parametrize("policy", ["mooncake", "kvasir"])
@pytest.mark.parametrize("name", ["h800-16", "h200-8", "laptop"])
def test_every_cluster_that_ships_runs(name: str, policy: str) -> None:
    assert figures(TRACE, "--cluster", name, "--policy", policy)["requests"] == 60


def test_a_split_that_was_asked_for_stays() -> None:
    assert "role_changes" not in figures(TRACE, "--split", "8P8D")["counters"]
    assert figures(TRACE, "--split", "8P8D", "--roles", "elastic")["counters"]["role_changes"]


def test_jitter_moves_arrivals_apart() -> None:
    assert figures(TRACE, "--jitter", "30s")["trace_span_s"] > figures(TRACE)["trace_span_s"]


def test_capacity_adds_its_speed_and_probes() -> None:
    flags = ("synthetic:conversation?requests=200", "--capacity")
    result = figures(*flags)
    passing = [p["speed"] for p in result["probes"] if p["passes"]]
    assert result["capacity_speed"] == result["speed"] == max(passing)
    assert result["within_capacity"] is True
    assert any(p["speed"] > result["capacity_speed"] for p in result["probes"])
    assert result["capacity_is_bound"] is False
    assert without_time(figures(*flags)) == without_time(result)


def test_a_capacity_beyond_the_search_is_called_a_bound() -> None:
    result = figures(TRACE, "--capacity", "--slo-ttft", "10h", "--slo-tbt", "10s")
    assert (result["capacity_speed"], result["capacity_is_bound"]) == (256.0, True)
    assert ">= 256" in run(TRACE, "--capacity", "--slo-ttft", "10h", "--slo-tbt", "10s").stdout


def test_no_capacity_is_null(cluster: str) -> None:
    result = figures(TRACE, "--cluster", cluster, "--capacity", "--slo-tbt", "1us")
    assert result["capacity_speed"] is None
    assert not any(p["passes"] for p in result["probes"])


def test_a_page_and_request_lines_are_written(tmp_path: Path) -> None:
    page, lines = tmp_path / "r.html", tmp_path / "r.jsonl"
    result = run(TRACE, "--html", str(page), "--save-requests", str(lines), "--json")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    figures = json.loads(result.stdout)
    assert len(rows) == figures["requests"]
    assert sum(row["effective"] for row in rows) == figures["effective"]
    text = page.read_text()
    assert text.count("<svg") == text.count("</svg>") == 8
    assert "Rejections by reason" in text
    assert f"note: report in {page}" in result.stderr


def test_a_scaled_objective_has_a_page_too(tmp_path: Path) -> None:
    run(TRACE, "--slo-ttft", "scaled", "--html", str(tmp_path / "r.html"))
    assert "own limit" in (tmp_path / "r.html").read_text()


def test_a_trace_without_hash_ids_says_so_on_stderr_in_json_and_on_the_page(tmp_path: Path) -> None:
    trace, page = tmp_path / "azure.csv", tmp_path / "r.html"
    trace.write_text(AZURE)
    result = run(str(trace), "--json", "--html", str(page))
    assert "note: not in the trace: prefix sharing: no hash_ids" in result.stderr
    assert json.loads(result.stdout)["unknown"][0].startswith("prefix sharing")
    assert "prefix sharing: no hash_ids" in page.read_text()


def test_an_unsorted_trace_is_sorted_and_said_so(tmp_path: Path) -> None:
    header, first, second = AZURE.splitlines()
    (tmp_path / "t.csv").write_text("\n".join((header, second, first)))
    assert "note: 1 request came out of order" in run(str(tmp_path / "t.csv")).stderr


def test_a_tokenizer_counts_a_text_trace(tmp_path: Path) -> None:
    from kvasir.engine import builtin_model

    text = "The quick brown fox jumps over the lazy dog. " * 40
    path = tmp_path / "share.json"
    path.write_text(json.dumps([{"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}]))
    estimated, counted = load_trace(str(path)), load_trace(str(path), tokenizer=builtin_model.path())
    assert estimated.requests[0].input_tokens == len(text) // 4
    assert counted.requests[0].input_tokens != estimated.requests[0].input_tokens
    with pytest.raises(ConfigError, match=r"--tokenizer: no file"):
        load_trace(str(path), tokenizer=tmp_path)


def test_a_cluster_file_finds_model_and_profile_beside_it(tmp_path: Path) -> None:
    from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
    from kvasir.engine import builtin_model

    fitted = FittedCost(PrefillFit(0.01, 1e-4, 0.0, 0.0), DecodeFit(0.01, 1e-4, 0.0), 0.0, 1e9)
    (tmp_path / "p.json").write_bytes(fitted.to_json())
    (tmp_path / "model").symlink_to(builtin_model.path())
    path = tmp_path / "c.toml"
    path.write_text(CLUSTER.replace('"qwen3-8b"', '"./model"') + 'costs = { profile = "p.json" }\n')
    found = find_cluster(str(path))
    assert found.costs == fitted
    assert found.num_layers == 6


def test_faults_come_from_a_file_or_a_seed(tmp_path: Path) -> None:
    cluster = find_cluster("paper-16")
    path = tmp_path / "faults.toml"
    path.write_text('[[fault]]\nat_s = 5\nkind = "node"\ntarget = "n03"\nduration_s = 60\n')
    (fault,) = faults_for(str(path), cluster, span_s=100.0)
    assert (fault.at_s, fault.target) == (5.0, "n03")
    assert len(faults_for("7", cluster, span_s=100.0)) == 5
    assert faults_for("7", cluster, span_s=100.0) == faults_for("7", cluster, span_s=100.0)
    assert faults_for(None, cluster, span_s=100.0) == ()
    assert figures(TRACE, "--faults", str(path))["faults"] == 1


def test_objectives_are_flat_or_scaled() -> None:
    assert objectives("10s", "50ms") == Slo(10.0, 0.05)
    assert objectives("scaled", "50ms") == ScaledSlo(tbt_s=0.05)


def test_a_split_replaces_the_file_s_roles(cluster: str) -> None:
    assert {i.role for i in find_cluster(cluster, "elastic").instances} == {Role.MIXED}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TRACE, "--policy", "best"), "unknown policy 'best'; known are random, "),
        ((TRACE, "--order", "best"), "unknown order 'best'; known are first-come"),
        ((TRACE, "--eviction", "best"), "unknown eviction 'best'; known are lru"),
        ((TRACE, "--cluster", "paper16"), "no cluster 'paper16'; a TOML file, or one of"),
        ((TRACE, "--cluster", "no.toml"), "cannot read no.toml: No such file or directory"),
        ((TRACE, "--split", "9P8D"), "paper-16: split 9P8D on 16 instances: 17 asked, 16 there"),
        ((TRACE, "--speed", "0"), "not a speed: 0"),
        ((TRACE, "--limit", "0"), "not a limit: 0"),
        ((TRACE, "--slo-ttft", "0s"), "--slo-ttft must be positive, got 0s"),
        ((TRACE, "--slo-tbt", "scaled"), "--slo-tbt: not a duration: 'scaled'"),
        ((TRACE, "--html", "/no/such/r.html"), "cannot write /no/such/r.html: no such directory"),
        ((TRACE, "--faults", "no.toml"), "cannot read no.toml"),
        ((TRACE, "--html", "."), "cannot write .: it is a directory; name a file in it"),
        ((TRACE, "--html", "r", "--save-requests", "r"), "cannot write r: the command reads or writes it already"),
        (("t.jsonl", "--save-requests", "t.jsonl"), "cannot write t.jsonl: the command reads or writes it already"),
        ((TRACE, "--jitter", "soon"), "--jitter: not a duration: 'soon'"),
        ((TRACE, "--split", ""), "paper-16: split: got ''"),
        ((TRACE, "--rate", "5"), "--rate is for traces without times"),
        (("no.jsonl",), "cannot read trace no.jsonl: No such file or directory"),
        (("synthetic:agents",), "no synthetic trace 'agents'"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises((ConfigError, TraceError)) as caught:
        run(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_disk_that_fills_up_does_not_take_the_result_along() -> None:
    command = _command(TRACE, "--json", "--html", "/dev/full")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(done.stdout)["requests"] == 60
    assert (done.returncode, done.stderr) == (2, "kvasir: cannot write /dev/full: No space left on device\n")


def test_an_unknown_fault_target_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "faults.toml"
    path.write_text('[[fault]]\nat_s = 5\nkind = "node"\ntarget = "n99"\nduration_s = 60\n')
    with pytest.raises(ConfigError, match="n99"):
        run(TRACE, "--faults", str(path))
    path.write_text('[[fault]]\nat_s = 5\nkind = "flood"\n')
    with pytest.raises(ConfigError, match="fault file"):
        run(TRACE, "--faults", str(path))


def test_from_a_shell_an_error_is_one_line_and_status_2() -> None:
    done = subprocess.run(_command(TRACE, "--policy", "best"), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("kvasir: unknown policy")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_prints_no_result_and_exits_130(tmp_path: Path) -> None:
    trace = tmp_path / "long.csv"
    rows = (
        f"2023-11-16 {hour:02d}:{minute:02d}:{second:02d},9000,400"
        for hour in range(8)
        for minute in range(60)
        for second in range(60)
    )
    trace.write_text("\n".join((AZURE.splitlines()[0], *rows)))
    command = _command(str(trace), "--capacity", "--json", "--policy", "least-loaded")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("note: ")  # the trace is read; a long search begins
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvasir.cli.main", "simulate", *arguments]


def test_help_teaches_by_example() -> None:
    text = CliRunner().invoke(app, ["--help"], env=os.environ | {"COLUMNS": "200"}).stdout
    assert "kvasir simulate conversation_trace.jsonl --cluster paper-16" in text
    assert "--capacity" in text
