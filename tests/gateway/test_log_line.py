"""A request's one log line: what an operator needs, and nothing that a user wrote."""

from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from kvasir.cluster.service import Rejected

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "SECRET"}]}


async def test_a_line_has_tokens_and_times(client: httpx.AsyncClient) -> None:
    with capture_logs() as lines:
        await client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "abc"})
    (line,) = lines
    assert (line["event"], line["id"], line["path"], line["status"]) == ("request", "abc", "/v1/chat/completions", 200)
    assert (line["cached_tokens"], line["output_tokens"]) == (3, 4)
    assert line["prompt_tokens"] > 5
    assert 0 <= line["ttft_ms"] / 1e3 <= line["seconds"]
    assert line["tbt_ms"] >= 0


async def test_a_rejection_has_its_code(client: httpx.AsyncClient, service: Any, rejection: Rejected) -> None:
    service.script = lambda _: [rejection]
    with capture_logs() as lines:
        await client.post("/v1/chat/completions", json=CHAT)
    assert (lines[0]["status"], lines[0]["code"]) == (429, "slo_tbt")
    assert 'kvasir_requests_rejected_total{code="slo_tbt",model_name="tiny"} 1.0' in (await client.get("/metrics")).text


@pytest.mark.parametrize("change", [{}, {"temperature": 9}, {"messages": "SECRET"}, {"model": "other"}, {"stream": True}])
async def test_no_line_ever_holds_a_prompt_or_an_answer(client: httpx.AsyncClient, change: dict[str, Any]) -> None:
    with capture_logs() as lines:
        await client.post("/v1/chat/completions", json=CHAT | change)
    assert lines
    assert "SECRET" not in str(lines)
    assert "quick brown" not in str(lines)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_is_logged_by_place_and_kind_only(url: str, service: Any, stream: bool) -> None:
    outputs = service.script
    service.script = lambda submission: [*list(outputs(submission))[:2], KeyError("SECRET")]
    with capture_logs() as lines:
        async with httpx.AsyncClient(base_url=url) as client:
            try:
                response = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
            except httpx.RemoteProtocolError:
                assert stream, "only a stream that has begun is cut"
            else:
                assert not stream
                assert response.status_code == 500
                assert "SECRET" not in response.text
    assert lines[0]["error"] == "KeyError"
    assert "SECRET" not in str(lines)


async def test_probes_are_not_logged(client: httpx.AsyncClient) -> None:
    with capture_logs() as lines:
        await client.get("/health")
        await client.get("/metrics")
    assert not lines
