"""`kvasir bench pool` measures what it says, of everything that it names."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvasir.cli.bench.pool_memory import measure_directory, measure_pool
from kvasir.cli.bench.pool_peers import PeerRuns
from kvasir.cli.bench.pool_transfer import Measured, measure
from kvasir.cli.bench.sizes import KIB
from kvasir.cli.main import make_app
from kvasir.core.errors import ConfigError

command = importlib.import_module("kvasir.cli.bench.pool")
SIZES = (64 * KIB,)


def test_puts_and_gets_are_slower_than_a_copy_by_what_the_pool_costs() -> None:
    (speed,) = measure_pool(working_set=1 << 20, rounds=2, sizes=SIZES)
    assert len(speed.put) == len(speed.get) == len(speed.memcpy) == 2
    assert 0.0 < speed.over_memcpy(speed.put) < 2.0


def test_the_index_is_measured_in_a_process_of_its_own() -> None:
    cost = measure_directory(blocks=20_000)
    assert cost.match_us > 0.0
    assert 0.0 < cost.insert_us < 1000.0
    assert cost.bytes_per_entry >= 0.0


def test_the_report_has_every_figure_and_says_why_one_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_direct_io(*_: Any, **__: Any) -> Any:
        raise ConfigError("no direct I/O here")

    monkeypatch.setattr(command, "measure_pool", lambda **_: measure_pool(working_set=1 << 20, rounds=1, sizes=SIZES))
    monkeypatch.setattr(command, "measure", lambda **_: measure(working_set=16 << 20, rounds=1, sizes=SIZES))
    monkeypatch.setattr(command, "measure_directory", lambda **_: measure_directory(blocks=2_000))
    monkeypatch.setattr(command, "measure_ssd", no_direct_io)
    done = CliRunner().invoke(make_app(), ["bench", "pool", "--directory", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    names = ("shm_put_over_memcpy", "shm_get_over_memcpy", "tcp_put_over_socket", "tcp_get_over_socket")
    for name in (*names, "tcp_put_over_unpaced_socket", "tcp_get_over_unpaced_socket"):
        assert found[name]["64 KiB"] > 0.0
    assert {"match_us", "insert_us", "bytes_per_entry"} <= found.keys()
    assert found["ssd_not_measured"] == "no direct I/O here"


def fake_python(directory: Path, body: str) -> None:
    python = directory / "python"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)


def test_ours_is_compared_with_a_peer_round_by_round_where_both_were_measured(tmp_path: Path) -> None:
    run = PeerRuns("mooncake_transfer", tmp_path / "python")
    for speed in (2.0, 4.0, 1.0):
        fake_python(tmp_path, f"""echo log; echo '{{"put 64 KiB": {speed}, "put_batch16 64 KiB": 9}}'""")
        run.run(1)
    ours = [Measured("tcp_put", 64 * KIB, (3.0, 4.0, 5.0)), Measured("shm_put", 64 * KIB, (9.0, 9.0, 9.0))]
    assert run.ours_over(ours) == {"put 64 KiB": 1.5}
    assert run.medians()["put 64 KiB"] == 2.0


@pytest.mark.parametrize("body", ["exit 3", "exec /nowhere/python"])
def test_a_peer_that_is_not_installed_is_said_and_not_tried_again(tmp_path: Path, body: str) -> None:
    run = PeerRuns("redis_transfer", tmp_path / "python")
    fake_python(tmp_path, body)
    run.run(1)
    assert run.failure.startswith("did not run: exit status")
    fake_python(tmp_path, "echo '{}'")
    run.run(1)
    assert not run.rounds
