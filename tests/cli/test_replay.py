"""`kvasir replay` end to end, against a scripted streaming server on a loopback port."""

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from kvasir.cli.replay import replay
from kvasir.core.errors import ClusterError, ConfigError, KvasirError, TraceError

Handler = Callable[[int, dict[str, Any]], list[bytes]]
"""From (number of the request, its body) to the pieces of the raw response; the connection closes after the last."""

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


@dataclass
class FakeServer:
    """An OpenAI-compatible server in a thread; `handler` may be exchanged before a replay."""

    handler: Handler
    models: dict[str, Any] = field(default_factory=lambda: {"data": [{"id": "m", "max_model_len": 4096, "vocab_size": 32000}]})
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(size)
            for piece in self.answer(head, body):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.002)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def answer(self, head: bytes, body: bytes) -> list[bytes]:
        self.heads.append(head)
        if head.startswith(b"GET /v1/models"):
            return [response(200, self.models)]
        self.bodies.append(json.loads(body))
        return self.handler(len(self.bodies) - 1, self.bodies[-1])


def response(status: int, body: object) -> bytes:
    data = json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data)


def event(payload: object) -> bytes:
    data = b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


def token(text: str = " x", finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def usage(body: dict[str, Any], cached: int | None = None) -> bytes:
    counts: dict[str, Any] = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return event({"choices": [], "usage": counts})


def good(_: int, body: dict[str, Any]) -> list[bytes]:
    tokens = [token()] * (body["max_tokens"] - 1)
    return [HEAD, *tokens, token(finish="length"), usage(body, cached=8), event(b"[DONE]") + END]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer(good)
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(fake.serve, "127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield fake
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    listening.close()
    for task in asyncio.all_tasks(loop):
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.run_until_complete(listening.wait_closed())
    loop.close()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Six requests in half a second; each shares its first block with all, and 3 and 4 two blocks with 0."""
    blocks = ([0, 1, 2], [0, 3], [0], [0, 1, 4], [0, 1, 5, 6], [0, 7])
    lines = [
        {"timestamp": 100 * i, "input_length": 512 * len(ids) - 100, "output_length": 40 + 10 * i, "hash_ids": ids}
        for i, ids in enumerate(blocks)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(source: object, server: FakeServer | str, *flags: str) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(replay)
    url = server if isinstance(server, str) else server.url
    return CliRunner().invoke(app, [str(source), "--url", url, "--speed", "10", "--scale-length", "0.1", *flags])


def result_of(outcome: Result) -> dict[str, Any]:
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    parsed: dict[str, Any] = json.loads(outcome.stdout)
    return parsed


def error_of(outcome: Result) -> KvasirError:
    assert isinstance(outcome.exception, KvasirError)
    assert "\n" not in str(outcome.exception)
    return outcome.exception


def test_a_replay_ends_in_the_benchmark_table(server: FakeServer, trace: Path) -> None:
    outcome = run(trace, server)
    assert outcome.exit_code == 0
    lines = outcome.stdout.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert "Successful requests:                     6" in lines
    assert "Effective requests:                      6" in lines
    assert "Skipped: longer than the context:        0" in lines


def test_json_goes_alone_to_stdout(server: FakeServer, trace: Path) -> None:
    result = result_of(run(trace, server, "--json"))
    assert (result["completed"], result["offered"], result["model_id"]) == (6, 6, "m")
    assert result["total_output_tokens"] == sum(4 + i for i in range(6))
    assert result["total_input_tokens"] == sum(51 * n - 10 for n in (3, 2, 1, 3, 4, 2))
    assert result["total_cached_tokens"] == 6 * 8
    assert result["mean_ttft_ms"] > 0


def test_requests_share_the_prefixes_that_the_trace_says(server: FakeServer, trace: Path) -> None:
    run(trace, server)
    prompts = [body["prompt"] for body in sorted(server.bodies, key=lambda body: body["max_tokens"])]
    assert prompts[0][:102] == prompts[3][:102] == prompts[4][:102]
    assert prompts[3][102] != prompts[4][102]
    assert all(1000 <= t < 32_000 for prompt in prompts for t in prompt)


def test_another_seed_sends_other_prompts(server: FakeServer, trace: Path) -> None:
    run(trace, server, "--limit", "1")
    run(trace, server, "--limit", "1", "--seed", "1")
    first, second = (body["prompt"] for body in server.bodies)
    assert len(first) == len(second)
    assert first[0] != second[0]


def test_a_synthetic_trace_needs_no_file(server: FakeServer) -> None:
    result = result_of(run("synthetic:conversation?requests=8&duration=2s", server, "--scale-length", "0.005", "--json"))
    assert result["completed"] == 8


def test_rejections_are_counted_by_reason_and_are_not_failures(server: FakeServer, trace: Path) -> None:
    def every_other(number: int, body: dict[str, Any]) -> list[bytes]:
        refusal = {"error": {"message": "busy", "type": "overloaded", "code": "predicted_ttft"}}
        return [response(429, refusal)] if number % 2 else good(number, body)

    server.handler = every_other
    result = result_of(run(trace, server, "--json"))
    assert (result["completed"], result["failed"], result["rejections"]) == (3, 0, {"predicted_ttft": 3})
    assert result["effective_request_share"] == 0.5


def test_a_stream_that_breaks_off_is_a_failure(server: FakeServer, trace: Path) -> None:
    server.handler = lambda _, body: [HEAD, token(), token()]
    outcome = run(trace, server, "--json")
    assert result_of(outcome)["failures"] == {"disconnected": 6}
    assert outcome.exit_code == 1


def test_a_stream_that_ends_well_formed_but_unfinished_is_a_failure(server: FakeServer, trace: Path) -> None:
    server.handler = lambda _, body: [HEAD, token(), END]
    assert result_of(run(trace, server, "--json"))["failures"] == {"disconnected": 6}


def test_an_error_inside_the_stream_is_a_failure_with_its_code(server: FakeServer, trace: Path) -> None:
    server.handler = lambda _, body: [HEAD, token(), event({"error": {"code": "decode_lost"}}), event(b"[DONE]"), END]
    assert result_of(run(trace, server, "--json"))["failures"] == {"decode_lost": 6}


def test_a_server_error_is_a_failure_by_its_status(server: FakeServer, trace: Path) -> None:
    server.handler = lambda _, body: [b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nOops"]
    assert result_of(run(trace, server, "--json"))["failures"] == {"http_500": 6}


def test_a_server_that_does_not_answer_in_time_is_a_failure(server: FakeServer, trace: Path) -> None:
    server.handler = lambda _, body: [HEAD, token()] + [b""] * 1000
    assert result_of(run(trace, server, "--json", "--timeout", "100ms"))["failures"] == {"timeout": 6}


def test_a_server_without_usage_is_counted_by_events(server: FakeServer, trace: Path) -> None:
    server.models = {"data": [{"id": "m"}]}
    server.handler = lambda _, body: [HEAD, token(), token(), token(finish="stop"), event(b"[DONE]"), END]
    result = result_of(run(trace, server, "--json"))
    assert (result["completed"], result["total_output_tokens"]) == (6, 18)
    assert result["total_cached_tokens"] is None
    assert all(1000 <= t < 20_000 for body in server.bodies for t in body["prompt"])


def test_tokens_that_come_in_one_event_are_all_counted(server: FakeServer, trace: Path) -> None:
    server.handler = lambda _, body: [HEAD, token(), token(" x" * 9, "length"), usage(body), event(b"[DONE]"), END]
    assert result_of(run(trace, server, "--json"))["total_output_tokens"] == sum(4 + i for i in range(6))


def test_requests_longer_than_the_context_are_skipped_and_said_to_be(server: FakeServer, trace: Path) -> None:
    server.models = {"data": [{"id": "m", "max_model_len": 149}]}
    outcome = run(trace, server, "--json")
    assert "2 of 6 requests are longer than the model's context" in outcome.stderr
    result = result_of(outcome)
    assert (result["completed"], result["skipped"], result["skipped_input_tokens"]) == (4, 2, 143 + 194)


def test_a_context_too_small_for_any_request_is_an_error(server: FakeServer, trace: Path) -> None:
    server.models = {"data": [{"id": "m", "max_model_len": 20}]}
    assert "no request fits the model's context of 20 tokens, the shortest needs 47" in str(error_of(run(trace, server)))


def test_chat_sends_words(server: FakeServer, trace: Path) -> None:
    server.handler = lambda _, body: [
        HEAD,
        event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
        event({"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]}),
        event(b"[DONE]") + END,
    ]
    assert result_of(run(trace, server, "--endpoint", "chat", "--no-ignore-eos", "--json"))["completed"] == 6
    assert len(server.bodies[0]["messages"][0]["content"].split()) == 143
    assert "ignore_eos" not in server.bodies[0]


def test_the_key_is_sent_and_never_printed(server: FakeServer, trace: Path) -> None:
    outcome = run(trace, server, "--api-key", "sesame")
    assert all(b"Authorization: Bearer sesame\r\n" in head for head in server.heads)
    assert "sesame" not in outcome.output


def test_results_and_timelines_are_saved(server: FakeServer, trace: Path, tmp_path: Path) -> None:
    result, requests = tmp_path / "result.json", tmp_path / "requests.jsonl"
    run(trace, server, "--save-result", str(result), "--save-requests", str(requests))
    assert json.loads(result.read_text())["completed"] == 6
    lines = [json.loads(line) for line in requests.read_text().splitlines()]
    assert [line["id"] for line in lines] == list("012345")
    assert [line["arrival_s"] for line in lines] == pytest.approx([0.01 * i for i in range(6)], abs=0.05)
    assert all(len(line["token_times_s"]) == line["output_tokens"] for line in lines)


def test_a_limit_on_requests_in_flight_makes_the_client_late(server: FakeServer, trace: Path) -> None:
    outcome = run(trace, server, "--max-in-flight", "1", "--output-scale", "0.3", "--json")
    assert "the client was late" in outcome.stderr
    assert result_of(outcome)["completed"] == 6


def test_ctrl_c_stops_sending_and_reports_what_happened(server: FakeServer, trace: Path) -> None:
    def interrupt_at_the_third(number: int, body: dict[str, Any]) -> list[bytes]:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return [HEAD, token()] + [b""] * 5000 if number else good(number, body)

    server.handler = interrupt_at_the_third
    outcome = run(trace, server, "--speed", "1", "--json")
    assert outcome.exit_code == 130
    result = result_of(outcome)
    assert (result["interrupted"], result["completed"], result["aborted"], result["not_sent"]) == (True, 1, 2, 3)


def test_nobody_at_the_url_is_a_one_line_error(trace: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        error = error_of(run(trace, f"http://127.0.0.1:{taken.getsockname()[1]}"))
    assert isinstance(error, ClusterError)
    assert "is the server running?" in str(error)


def test_a_server_that_dies_midway_is_failures_and_not_a_crash(server: FakeServer, trace: Path) -> None:
    server.handler = lambda number, body: good(number, body) if number < 3 else []
    result = result_of(run(trace, server, "--json"))
    assert (result["completed"], result["failures"]) == (3, {"disconnected": 3})


def test_what_is_not_an_openai_api_is_refused(server: FakeServer, trace: Path) -> None:
    server.models = {}
    assert "server offers 0 models" in str(error_of(run(trace, server)))


def test_among_several_models_one_must_be_picked(server: FakeServer, trace: Path) -> None:
    server.models = {"data": [{"id": "a"}, {"id": "b"}]}
    assert "server offers 2 models (a, b); pick one with --model" in str(error_of(run(trace, server)))
    assert "server has no model 'c'; it has a, b" in str(error_of(run(trace, server, "--model", "c")))
    assert result_of(run(trace, server, "--model", "b", "--json"))["model_id"] == "b"


def test_a_malformed_trace_is_a_one_line_error(server: FakeServer, trace: Path) -> None:
    trace.write_text(trace.read_text() + '{"timestamp": 600}\n')
    assert str(error_of(run(trace, server))) == "trace line 7: input_length: got nothing, expected an integer >= 1"


def test_a_trace_out_of_order_is_sorted_with_a_note(server: FakeServer, trace: Path) -> None:
    trace.write_text("".join(reversed(trace.read_text().splitlines(keepends=True))))
    outcome = run(trace, server)
    assert "note: 5 requests of" in outcome.stderr
    assert outcome.exit_code == 0


@pytest.mark.parametrize(
    ("flags", "kind", "message"),
    [
        (["--speed", "0"], ConfigError, "not a speed: 0"),
        (["--limit", "-1"], ConfigError, "not a limit: -1"),
        (["--slo-ttft", "soon"], ConfigError, "not a duration: 'soon'"),
        (["--timeout", "0s"], ConfigError, "not a --timeout"),
        (["--max-in-flight", "0"], ConfigError, "not a --max-in-flight: 0"),
        (["--start", "1h"], TraceError, "no request arrives in"),
        (["--vocab-size", "3"], ConfigError, "not a vocabulary: 3 tokens"),
        (["--save-result", "/nowhere/at/all.json"], ConfigError, "cannot write /nowhere/at/all.json"),
        (["--url", "127.0.0.1"], ConfigError, "not a URL: '127.0.0.1'"),
    ],
)
def test_a_flag_that_cannot_work_is_a_one_line_error(
    server: FakeServer, trace: Path, flags: list[str], kind: type[KvasirError], message: str
) -> None:
    error = error_of(run(trace, server, *flags))
    assert isinstance(error, kind)
    assert message in str(error)


def test_a_trace_that_is_not_there_is_a_one_line_error(server: FakeServer) -> None:
    assert "cannot read trace nowhere.jsonl: No such file" in str(error_of(run("nowhere.jsonl", server)))
