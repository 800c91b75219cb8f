"""`kvasir top` as its user sees it: pictures, lines of JSON, one line of trouble, and a clean end."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from kvasir.cli.top.command import _Looks, ask
from kvasir.cli.top.view import screen
from kvasir.cluster.kv_events import Follower, KvEventSubscriber
from kvasir.core.errors import ClusterError
from kvasir.pool.directory import BlockDirectory
from tests.cli.test_serve import FAKE, KVASIR, Server, complete, free_port, run, server

pytestmark = pytest.mark.timeout(180)

URL = "http://kvasir:8000"


def status_of(**changes: Any) -> dict[str, Any]:
    tier = {
        "tier": "dram",
        "blocks": 50,
        "slots": 100,
        "bytes": 50 << 20,
        "capacity_bytes": 100 << 20,
        "hits": 30,
        "evictions": 7,
    }
    transport = {"name": "tcp", "bytes": 8 << 20, "transfers": 4, "failures": 1, "retries": 2, "seconds": 0.2, "queued": 3}
    instance = {"id": "prefill-0", "role": "prefill", "node": "node0", "epoch": 1, "running": 2, "waiting": 3}
    instance |= {"waiting_tokens": 1234, "context_tokens": 500, "free_kv_tokens": 0, "heartbeat_age_s": 0.1}
    instance |= {"prefill_scale": 3.25, "decode_scale": None}
    instance |= {"prompt_tokens": 1000, "output_tokens": 10}
    decision = {"request_id": "cmpl-abcdef", "age_s": 2.0, "policy": "mooncake", "prefill": "prefill-0", "decode": "decode-0"}
    decision |= {
        "ttft_s": 0.5,
        "tbt_s": 0.01,
        "refusal": None,
        "reason": "prefill on prefill-0 by least TTFT: wait 1 s; decode on x",
    }
    status = {
        "version": "1.0", "model": "small", "time_s": 10.0, "uptime_s": 75.0, "ready": True, "reason": "",
        "nodes": [{"node": "node0", "instances": 1, "used_share": 0.5, "leases": 1, "lookups": 60, "misses": 20,
                   "tiers": [tier], "transports": [transport], "tenants": [{"tenant": "abc", "blocks": 5, "quota": 9}]}],
        "instances": [instance],
        "requests": {"answered": 20, "rejected": {"slo_ttft": 4}, "prompt_tokens": 2000, "cached_tokens": 500,
                     "generation_tokens": 70},
        "slo": {"ttft_s": 30.0, "tbt_s": 0.1, "effective": 18, "offered": 24, "attainment": 0.75},
        "latency": {"of_last": 20, "ttft_s": {"p50": 0.1, "p90": 0.2, "p99": 0.3}, "tbt_s": None},
        "decisions": [decision, decision | {"refusal": "decode is full", "prefill": None, "decode": None, "ttft_s": None}],
        "pins": [{"id": "p1", "tokens": 640, "blocks": 10, "ttl_s": 90.0, "priority": 1, "tenant": ""}],
        "counters": {},
    }  # fmt: skip
    return status | changes


def drawn(picture: Any, width: int = 160) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"), highlight=False)  # noqa: SIM115
    with console.file:
        console.print(picture)
        return console.export_text()


class TestPicture:
    def test_everything_that_matters_is_in_it(self) -> None:
        text = drawn(screen(status_of(), None))
        for piece in (
            "ready", "up 1m 15s", "requests 20", "slo_ttft 4", "SLO met by 75.0%", "100 ms / 200 ms / 300 ms",
            "25.0% of them from cache", "prefill-0", "1,234", "3.2", "50 of 100", "50.0 MiB", "50.0%", "tcp",
            "8.0 MiB", "50 ms", "abc", "p1", "1m 30s",
            "prefill-0 → decode-0", "500 ms", "least TTFT: wait 1 s", "decode is full",
        ):  # fmt: skip
            assert piece in text, piece

    def test_rates_are_between_two_looks(self) -> None:
        later = status_of(time_s=12.0)
        later["instances"] = [later["instances"][0] | {"prompt_tokens": 3000, "output_tokens": 11}]
        text = drawn(screen(later, status_of()))
        (line,) = [line for line in text.splitlines() if line.startswith("prefill-0 ") and "1,234" in line]
        assert line.split()[-3:-1] == ["1,000", "0.5"]

    def test_a_server_that_started_again_has_no_rates_yet(self) -> None:
        text = drawn(screen(status_of(time_s=3.0), status_of()))
        (line,) = [line for line in text.splitlines() if line.startswith("prefill-0 ") and "1,234" in line]
        assert line.split()[-3:-1] == ["-", "-"]

    def test_an_idle_cluster_of_nothing_can_be_shown(self) -> None:
        latency = {"of_last": 0, "ttft_s": None, "tbt_s": None}
        slo = {"ttft_s": 30.0, "tbt_s": 0.1, "effective": 0, "offered": 0, "attainment": None}
        empty = status_of(
            nodes=[], instances=[], decisions=[], pins=[], latency=latency, slo=slo, ready=False, reason="waiting [x]"
        )
        text = drawn(screen(empty, None))
        assert "not ready: waiting [x]" in text
        assert "tenant" not in text

    @pytest.mark.parametrize("width", [20, 80, 300])
    def test_it_fits_any_width(self, width: int) -> None:
        assert all(len(line) <= width for line in drawn(screen(status_of(), status_of()), width).splitlines())


class TestAsking:
    @pytest.mark.parametrize(
        ("answer", "says"),
        [
            (httpx.Response(404, text="no"), "check --url"),
            (httpx.Response(403, json={"error": {"message": "closed"}}), "closed; give the key with --admin-key"),
            (httpx.Response(500, text=""), "answered with status 500: no reason given"),
            (httpx.Response(200, text="<html>"), "no state of a cluster"),
            (httpx.Response(200, json=[1]), "no state of a cluster"),
            (httpx.ConnectError("Connection refused"), "start `kvasir serve`"),
            (httpx.ReadTimeout("late"), "no answer"),
        ],
    )
    def test_trouble_is_one_line_with_the_remedy(self, answer: httpx.Response | Exception, says: str) -> None:
        def handle(request: httpx.Request) -> httpx.Response:
            if isinstance(answer, Exception):
                raise answer
            return answer

        with httpx.Client(base_url=URL, transport=httpx.MockTransport(handle)) as client, pytest.raises(ClusterError) as raised:
            ask(client)
        assert says in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_it_keeps_trying_and_shows_what_it_last_saw(self) -> None:
        answers = iter([httpx.Response(200, json=status_of()), httpx.Response(502), httpx.Response(200, json=status_of())])
        with httpx.Client(base_url=URL, transport=httpx.MockTransport(lambda request: next(answers))) as client:
            looks = _Looks(client)
            pictures = [drawn(looks.next()) for _ in range(3)]
        assert "status 502" in pictures[1]
        assert "still trying" in pictures[1]
        assert ["prefill-0" in picture for picture in pictures] == [True, True, True]
        assert "still trying" not in pictures[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int, int]]:
    events, replay = free_port(), free_port()
    flags = ["--kv-events", f"tcp://127.0.0.1:{events}", "--kv-events-replay", f"tcp://127.0.0.1:{replay}"]
    with server([*FAKE, *flags, "--kv-events-hashes", "bytes"], tmp_path_factory.mktemp("runtime")) as found:
        yield found, events, replay


class TestAgainstAServer:
    def test_once_shows_the_cluster_as_a_picture_and_as_json(self, cluster: tuple[Server, int, int]) -> None:
        found, _, _ = cluster
        assert complete(found.url, max_tokens=3).status_code == 200
        picture = run("top", "--once", "--url", found.url, "--interval", "200ms")
        assert picture.returncode == 0, picture.stderr
        assert "prefill-0" in picture.stdout
        assert "decode-0" in picture.stdout
        as_json = run("top", "--once", "--json", "--url", found.url)
        status = json.loads(as_json.stdout)
        assert status["requests"]["answered"] >= 1
        assert status["decisions"][0]["prefill"] == "prefill-0"
        assert sum(instance["prompt_tokens"] for instance in status["instances"]) >= 3

    def test_a_cleared_cache_computes_again(self, cluster: tuple[Server, int, int]) -> None:
        found, _, _ = cluster
        body = {"prompt": [2 + n % 200 for n in range(200)], "max_tokens": 2}

        def cached() -> int:
            usage = complete(found.url, **body).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        cached()
        assert cached() == 192
        answer = httpx.post(f"{found.url}/admin/cache/clear", timeout=10.0)
        assert answer.json()["forgotten_blocks"]["node0"] >= 3, answer.text
        assert cached() == 0

    def test_blocks_of_prompts_and_answers_are_published(self, cluster: tuple[Server, int, int]) -> None:
        found, events, replay = cluster
        prompt = [1 + n % 300 for n in range(130)]
        body = {"prompt": prompt, "max_tokens": 70, "ignore_eos": True, "temperature": 0}
        assert complete(found.url, **body).json()["usage"]["completion_tokens"] == 70
        directory = BlockDirectory()
        follower = Follower(directory, lambda rank: f"node{rank}")

        async def follow() -> None:
            subscriber = KvEventSubscriber(follower, f"tcp://127.0.0.1:{events}", f"tcp://127.0.0.1:{replay}")
            running = asyncio.create_task(subscriber.run())
            async with asyncio.timeout(20.0):
                while follower.num_blocks() < 3:
                    await asyncio.sleep(0.05)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            subscriber.close()

        asyncio.run(follow())
        assert follower.counts.garbage == follower.counts.orphans == 0
        assert len(directory) >= 3  # two blocks of the prompt, one that the answer filled

    def test_ctrl_c_ends_it_cleanly_on_a_terminal(self, cluster: tuple[Server, int, int]) -> None:
        found, _, _ = cluster
        output, status = on_a_terminal(["top", "--url", found.url, "--interval", "200ms"], until=b"decode-0")
        assert status == 0
        assert b"Traceback" not in output
        assert output.rstrip().endswith(b"\x1b[?1049l")  # the terminal is as it was

    def test_it_waits_for_a_server_that_is_not_there(self) -> None:
        output, status = on_a_terminal(["top", "--url", f"http://127.0.0.1:{free_port()}"], until=b"still trying")
        assert status == 0
        assert b"Traceback" not in output


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--url", "nonsense"], "--url must be like"),
        (["--interval", "soon"], "not a duration"),
        (["--interval", "1us"], "--interval must be at least"),
        (["--once", "--url", "http://127.0.0.1:9"], "start `kvasir serve`"),
    ],
)
def test_what_cannot_work_is_one_line(flags: list[str], says: str) -> None:
    result = run("top", *flags)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def on_a_terminal(arguments: list[str], *, until: bytes) -> tuple[bytes, int]:
    """Run a command under a pseudo-terminal, press Ctrl-C once it shows `until`; its output and exit status."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40"}
    process = subprocess.Popen([*KVASIR, *arguments], stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    output, deadline, pressed = b"", time.monotonic() + 60, False
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                output += os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
        if until in output and not pressed:
            pressed = True
            process.send_signal(signal.SIGINT)
    os.close(leader)
    assert pressed, output
    return output, process.wait(10)


def test_a_key_may_come_from_the_environment(tmp_path: Path) -> None:
    with server([*FAKE, "--api-key", "sk-one", "--admin-key", "sk-admin"], tmp_path) as found:
        refused = run("top", "--once", "--json", "--url", found.url)
        assert refused.returncode == 2
        assert "KVASIR_ADMIN_KEY" in refused.stderr
        environment = {**os.environ, "KVASIR_ADMIN_KEY": "sk-admin"}
        command = [sys.executable, "-m", "kvasir.cli.main", "top", "--once", "--json", "--url", found.url]
        opened = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert json.loads(opened.stdout)["ready"] is True
