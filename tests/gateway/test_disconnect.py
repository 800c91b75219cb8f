"""A client that goes away takes its request with it, and a server that stops waits for its answers."""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from kvasir.core.errors import ConfigError
from kvasir.gateway.app import make_app
from kvasir.gateway.config import GatewayConfig
from kvasir.gateway.server import serve_http
from kvasir.gateway.tokenizer import Tokenizer

TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 64}
SLOW_S = 5.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def raw_request(body: dict[str, Any]) -> bytes:
    raw = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_disconnect_aborts_every_choice(url: str, service: Any, says: Any, stream: bool, n: int) -> None:
    fast = says("the")(_any_submission())
    slow = says("the quick", gap_s=SLOW_S)
    service.script = lambda submission: [*(step for step in fast[:-1]), fast[-1].__class__(fast[-1].tokens), *slow(submission)]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    writer.write(raw_request(TEXT | {"stream": stream, "n": n}))
    await until(lambda: len(service.submitted) == n)
    if stream:
        await reader.readuntil(b'"text":"the"')
    writer.close()
    await writer.wait_closed()
    await until(lambda: len(service.aborted) == n)


async def test_a_client_that_stops_reading_is_given_up(service: Any, tokenizer: Tokenizer, says: Any) -> None:
    service.script = says("the quick brown fox " * 6000)  # 4 MB of events, more than the socket buffers hold
    service.spec = _with_context(service.spec, 10**6)
    app = make_app(service, tokenizer, GatewayConfig(send_timeout_s=0.2))
    async with serve_http(app, "127.0.0.1", 0, stop_timeout_s=1) as port:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(raw_request(TEXT | {"stream": True, "max_tokens": 10**5}))
            await until(lambda: bool(service.aborted))


async def test_running_answers_end_when_the_server_stops(service: Any, tokenizer: Tokenizer, says: Any) -> None:
    service.script = says("the quick brown fox", gap_s=0.05)
    app = make_app(service, tokenizer, GatewayConfig())
    async with httpx.AsyncClient() as client:
        async with serve_http(app, "127.0.0.1", 0, stop_timeout_s=5) as port:
            asking = asyncio.create_task(client.post(f"http://127.0.0.1:{port}/v1/completions", json=TEXT))
            await until(lambda: bool(service.submitted))
        assert (await asking).json()["choices"][0]["text"] == "the quick brown fox"
        assert not service.aborted


async def test_answers_that_outlive_the_deadline_are_aborted(service: Any, tokenizer: Tokenizer, says: Any) -> None:
    service.script = says("the quick", gap_s=60)
    app = make_app(service, tokenizer, GatewayConfig())
    async with httpx.AsyncClient() as client:
        async with serve_http(app, "127.0.0.1", 0, stop_timeout_s=0) as port:
            asking = asyncio.create_task(client.post(f"http://127.0.0.1:{port}/v1/completions", json=TEXT))
            await until(lambda: bool(service.submitted))
        assert len(service.aborted) == 1
        response = await asking
        assert response.status_code == 503
        assert "the server is stopping" in response.json()["error"]["message"]


async def test_a_stream_that_outlives_the_deadline_ends_with_an_error_event(
    service: Any, tokenizer: Tokenizer, says: Any
) -> None:
    first, *_ = [step for step in says("the quick")(_any_submission()) if not isinstance(step, float)]
    service.script = lambda _: [first, 60.0]
    app = make_app(service, tokenizer, GatewayConfig())
    async with serve_http(app, "127.0.0.1", 0, stop_timeout_s=0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw_request(TEXT | {"stream": True}))
        await reader.readuntil(b'"text":"the"')
    async with asyncio.timeout(10):
        rest = await reader.read()
    writer.close()
    assert len(service.aborted) == 1
    assert b"the server is stopping" in rest
    assert b"[DONE]" not in rest


async def test_a_client_that_leaves_while_it_sends_is_no_error(url: str, service: Any) -> None:
    with capture_logs() as lines:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(raw_request(TEXT)[:-5])
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()
        await until(lambda: bool(lines))
    assert [(line["status"], line["code"]) for line in lines] == [(499, "client_gone")]
    assert not service.submitted


async def test_a_port_in_use_is_a_config_error_with_the_remedy(service: Any, tokenizer: Tokenizer) -> None:
    app = make_app(service, tokenizer, GatewayConfig())
    async with serve_http(app, "127.0.0.1", 0) as port:
        with pytest.raises(ConfigError, match=f"port {port} .*--port"):
            async with serve_http(app, "127.0.0.1", port):
                pass


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 80), ("127.0.0.1", 70_000)])
async def test_an_impossible_address_is_a_config_error(service: Any, tokenizer: Tokenizer, host: str, port: int) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        async with serve_http(make_app(service, tokenizer, GatewayConfig()), host, port):
            pass


def _any_submission() -> Any:
    from kvasir.cluster.service import Submission
    from kvasir.core.request import Sampling

    return Submission(request_id="r", prompt=[1], max_tokens=4, sampling=Sampling())


def _with_context(spec: Any, max_model_len: int) -> Any:
    from msgspec.structs import replace

    return replace(spec, max_model_len=max_model_len)
