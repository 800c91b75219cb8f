"""`kvasir demo`: the main job in two minutes, with the same commands and the same API that a user has."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from kvasir.core.errors import ClusterError

READY_DEADLINE_S = 300.0
STOP_DEADLINE_S = 20.0

_NOTES = (
    "You answer briefly. These are the notes of the team. A tuple is an immutable sequence; a list can be changed. "
    "A dictionary maps keys to values, and its keys must be hashable. A generator yields values one at a time and keeps its "
    "state between them. A context manager sets something up and tears it down again, also when an error is raised. "
    "The pass key is 71432. Remember it. "
    "A module is a file of definitions; a package is a directory of modules. Functions are first-class objects."
)
_QUESTIONS = ("Hello", "What is the pass key?")

_console = Console(highlight=False)


def demo(
    requests: Annotated[int, typer.Option(help="Requests of the conversation workload to replay.")] = 100,
    speed: Annotated[float, typer.Option(help="How much faster than in real life they arrive.")] = 120.0,
) -> None:
    """Start a cluster, chat with it twice, replay a slice of conversation traffic, print the table, stop everything.

    Nothing is needed but this package: the model is the built-in one.
    """
    port = _free_port()
    with _server(
        ["--port", str(port), "--prefill", "1", "--decode", "1", "--dram", "2GiB", "--log-level", "warning"], port
    ) as url:
        _chat(url)
        _say("A slice of conversation traffic, open loop, lengths scaled to this machine:")
        _replay(url, requests, speed)
    _say("Everything is stopped. `kvasir serve` starts it again for you; `kvasir replay --help` knows more traffic.")


@contextmanager
def _server(flags: list[str], port: int) -> Iterator[str]:
    _say("$ kvasir serve " + " ".join(flags))
    process = subprocess.Popen([sys.executable, "-m", "kvasir.cli.main", "serve", *flags])
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            status = process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise ClusterError(f"the cluster did not stop within {STOP_DEADLINE_S:g} s") from None
    if status != 0:
        raise ClusterError(f"kvasir serve ended with status {status}; its message is above")


def _wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_DEADLINE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClusterError(f"kvasir serve ended with status {process.returncode}; its message is above")
        try:
            if httpx.get(f"{url}/ready", timeout=2.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise ClusterError(f"the cluster was not ready within {READY_DEADLINE_S:g} s")


def _chat(url: str) -> None:
    """Two turns of one chat; the second finds the first one's KVCache, the answer's included."""
    messages: list[dict[str, str]] = [{"role": "system", "content": _NOTES}]
    for question in _QUESTIONS:
        _say(f"[bold]user:[/bold] {question}")
        messages.append({"role": "user", "content": question})
        answer, usage, ttft_s = _stream(url, messages)
        messages.append({"role": "assistant", "content": answer})
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        _say(
            f"[dim]first token after {ttft_s * 1e3:.0f} ms; "
            f"{usage['prompt_tokens']} prompt tokens, {cached} of them from cache[/dim]"
        )


def _stream(url: str, messages: list[dict[str, str]]) -> tuple[str, dict[str, Any], float]:
    body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": 80}
    answer, first = "", None
    usage: dict[str, Any] = {}
    started = time.monotonic()
    _console.print("[bold]kvasir:[/bold] ", end="")
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60.0) as response:
        if response.status_code != 200:
            raise ClusterError(f"the chat was answered with status {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[len("data: ") :])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text = choice["delta"].get("content") or ""
                first = first or (time.monotonic() if text else None)
                answer += text
                _console.print(text, end="", markup=False, soft_wrap=True)
    _console.print()
    return answer, usage, (first or time.monotonic()) - started


def _replay(url: str, requests: int, speed: float) -> None:
    flags = [f"synthetic:conversation?requests={requests}&duration=1h", "--url", url, "--speed", str(speed)]
    flags += ["--scale-length", "0.125", "--output-scale", "0.1", "--seed", "1"]
    _say("$ kvasir replay " + " ".join(flags))
    status = subprocess.run([sys.executable, "-m", "kvasir.cli.main", "replay", *flags], check=False).returncode
    if status != 0:
        raise ClusterError(f"kvasir replay ended with status {status}; its message is above")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _say(text: str) -> None:
    _console.print(text, soft_wrap=True)
