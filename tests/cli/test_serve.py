"""`kvasir serve` as its user sees it: it says what is wrong in one line, and whatever ends it, nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.timeout(120)

KVASIR = [sys.executable, "-m", "kvasir.cli.main"]
FAKE = ["--engine", "fake", "--dram", "16MiB"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A running `kvasir serve`, its address and its child processes."""

    def __init__(self, flags: list[str], runtime: Path):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
        command = [*KVASIR, "serve", "--port", str(port), *flags]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.runtime = runtime

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.stderr.read() if self.process.stderr else ""
            try:
                if httpx.get(f"{self.url}/ready", timeout=2.0).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError("not ready in time")

    def wait_instances(self, count: int) -> None:
        """Ready means that each role is there; this waits for all instances."""
        deadline = time.monotonic() + 60
        while httpx.get(f"{self.url}/metrics").text.count("\nkvasir_num_requests_running{") < count:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def children(self) -> list[int]:
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in found]


@contextmanager
def server(flags: list[str], runtime: Path) -> Iterator[Server]:
    found = Server(flags, runtime)
    try:
        found.wait_ready()
        yield found
    finally:
        if found.process.poll() is None:
            found.process.kill()
        found.process.communicate()


def ended(pids: list[int], within_s: float) -> bool:
    """Whether all of these processes are gone, zombies not counted as alive."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def complete(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"model": "kvasir-small", "prompt": [5, 6, 7], **body}, timeout=30.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    with server(FAKE, tmp_path) as found:
        assert complete(found.url, max_tokens=3).status_code == 200
        children = found.children()
        assert len(children) == 3  # pool, prefill, decode
        found.process.send_signal(number)
        assert found.process.wait(20) == 0
        assert ended(children, 1.0)
        assert list(tmp_path.iterdir()) == []


def test_children_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    with server(FAKE, tmp_path) as found:
        children = found.children()
        found.process.kill()
        assert ended(children, 5.0)
        deadline = time.monotonic() + 3
        while list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(tmp_path.iterdir()) == []


def test_a_signal_while_loading_stops_everything(tmp_path: Path) -> None:
    found = Server(FAKE, tmp_path)
    time.sleep(2.5)
    found.process.send_signal(signal.SIGINT)
    assert found.process.wait(20) in (0, 130, -signal.SIGINT)
    found.process.communicate()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_instance_comes_back(tmp_path: Path) -> None:
    with server([*FAKE, "--mixed", "2"], tmp_path) as found:
        found.wait_instances(2)
        before = set(found.children())
        victim = max(before)
        os.kill(victim, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while len(set(found.children()) - {victim}) < len(before) and time.monotonic() < deadline:
            assert complete(found.url, max_tokens=3).status_code == 200
            time.sleep(0.2)
        assert len(set(found.children()) - {victim}) == len(before)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KVASIR, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["/no/such/model"], "/no/such/model"),
        (["--prefill", "0"], "prefill"),
        (["--block-tokens", "17"], "17"),
        (["--dram", "lots"], "lots"),
        (["--dram", "4KiB"], "4KiB"),
        (["--dram", "9000TiB"], "9000TiB"),
        (["--dtype", "int3"], "one of auto, bfloat16, float32, got 'int3'"),
        (["--dram", "1e400GiB"], "1e400GiB"),
        (["--threads", "0"], "--threads"),
        (["--max-model-len", "1"], "--max-model-len"),
        (["--policy", "magic"], "magic"),
        (["--slo-tbt", "-5ms"], "-5ms"),
        (["--port", "70000"], "70000"),
        (["--config", "/no/such.toml"], "/no/such.toml"),
        (["--max-model-len", "99999999"], "99999999"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(flags: list[str], named: str) -> None:
    result = run("serve", *flags)
    assert result.returncode == 2
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_config_key_is_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('dram = "1GiB"\nprefil = 2\n')
    result = run("serve", "--config", str(file))
    assert result.returncode == 2
    assert "prefil" in result.stderr
    assert "slo_ttft" in result.stderr


def test_a_port_in_use_is_told_before_anything_is_started() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("serve", *FAKE, "--port", str(taken.getsockname()[1]))
    assert result.returncode == 2
    assert "in use" in result.stderr


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('engine = "fake"\ndram = "16MiB"\nprefill = 2\nserved-model-name = "from-file"\n')
    with server(["--config", str(file), "--prefill", "1"], tmp_path / ".") as found:
        assert len(found.children()) == 3
        assert httpx.get(f"{found.url}/v1/models").json()["data"][0]["id"] == "from-file"
        found.process.send_signal(signal.SIGINT)
        found.process.wait(20)
    file.unlink()


def test_help_teaches() -> None:
    result = run("serve", "--help")
    assert result.returncode == 0
    for word in ("--prefill", "--slo-ttft", "--config", "curl"):
        assert word in result.stdout


def test_metrics_tell_of_requests(tmp_path: Path) -> None:
    with server(FAKE, tmp_path) as found:
        answer = complete(found.url, max_tokens=4, stream=False)
        assert json.loads(answer.text)["usage"]["completion_tokens"] == 4
        text = httpx.get(f"{found.url}/metrics").text
        assert "kvasir_time_to_first_token_seconds" in text
        found.process.send_signal(signal.SIGINT)
        found.process.wait(20)
