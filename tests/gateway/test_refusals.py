"""Everything that a client can get wrong, and what it is told."""

from typing import Any

import httpx
import pytest

from kvasir.cluster.service import Output, Rejected, RequestFailed
from kvasir.core.commands import Fail
from kvasir.core.errors import ClusterError, DeadlineExceeded
from kvasir.core.request import FinishReason
from kvasir.engine.interface import SampledToken
from kvasir.gateway.config import GatewayConfig

TEXT: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 4}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "SECRET hi"}]}


def check(response: httpx.Response, status: int, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert "\n" not in error["message"]
    assert "SECRET" not in response.text
    assert code is None or error["code"] == code
    assert param is None or error["param"] == param
    return error


BAD_TEXT = [
    ({"model": 5}, "model"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": {"SECRET": 1}}, "prompt"),
    ({"prompt": ["hi", 3]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": [1] * 512}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"),
    ({"max_tokens": 512}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 65, "prompt": ["a", "b"]}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "x" * 2000}, "stop"),
    ({"stop_token_ids": [-3]}, "stop_token_ids"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 4}, "best_of"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -1}, "frequency_penalty"),
    ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"min_p": 0.1}, "min_p"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"stream": "perhaps"}, "stream"),
    ({"stream_options": []}, "stream_options"),
]


@pytest.mark.parametrize(("change", "param"), BAD_TEXT, ids=str)
async def test_a_bad_value_is_a_400_that_names_its_field(
    client: httpx.AsyncClient, service: Any, change: Any, param: str
) -> None:
    body = {name: value for name, value in (TEXT | change).items() if value is not None}
    check(await client.post("/v1/completions", json=body), 400, param=param)
    assert not service.submitted


BAD_CHAT = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "SECRET"}, "messages"),
    ({"messages": [{"content": "SECRET"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "SECRET"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "SECRET" * 1000}]}, "prompt"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
]


@pytest.mark.parametrize(("change", "param"), BAD_CHAT, ids=[str(i) for i in range(len(BAD_CHAT))])
async def test_a_bad_chat_is_a_400_without_its_text(client: httpx.AsyncClient, service: Any, change: Any, param: str) -> None:
    body = {name: value for name, value in (CHAT | change).items() if value is not None}
    check(await client.post("/v1/chat/completions", json=body), 400, param=param)
    assert not service.submitted


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"SECRET", b"[1]", b'"x"', b"null", b'{"model": "SECRET', b"\xff\xfe", b"[" * 10_000]
)
async def test_malformed_json_is_a_400(client: httpx.AsyncClient, raw: bytes) -> None:
    check(await client.post("/v1/completions", content=raw), 400, code="invalid_json")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p"])
async def test_numbers_must_be_finite(client: httpx.AsyncClient, field: str, value: str) -> None:
    raw = f'{{"model": "tiny", "prompt": "hi", "{field}": {value}}}'
    check(await client.post("/v1/completions", content=raw.encode()), 400, param=field)


async def test_unknown_and_neutral_fields_are_accepted(client: httpx.AsyncClient) -> None:
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1, "tools": [], "min_p": 0}
    odd = {"something_new": {"a": 1}, "user": "u", "top_k": -1, "seed": None, "stop": None, "n": None, "suffix": None}
    assert (await client.post("/v1/completions", json=TEXT | neutral | odd)).status_code == 200
    assert (await client.post("/v1/completions", json=TEXT | {"ignore_eos": True, "min_tokens": 4})).status_code == 200


async def test_a_prompt_that_is_too_long_is_told_both_numbers(client: httpx.AsyncClient) -> None:
    error = check(await client.post("/v1/completions", json=TEXT | {"prompt": [1] * 600}), 400, code="context_length_exceeded")
    assert "600" in error["message"]
    assert "512" in error["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_an_unknown_model_is_a_404(client: httpx.AsyncClient, path: str) -> None:
    body = {"model": "gpt-9", "prompt": "hi", "messages": CHAT["messages"], "tokens": [1]}
    error = check(await client.post(path, json=body), 404, code="model_not_found", param="model")
    assert "'tiny'" in error["message"]
    check(await client.get("/v1/models/gpt-9"), 404, code="model_not_found")


async def test_unknown_paths_and_methods_are_404_and_405(client: httpx.AsyncClient) -> None:
    check(await client.post("/v1/embeddings", json={}), 404, code="not_found")
    response = await client.get("/v1/completions")
    check(response, 405, code="method_not_allowed")
    assert response.headers["allow"] == "POST"


async def test_tokenize_takes_a_prompt_or_messages(client: httpx.AsyncClient) -> None:
    check(await client.post("/tokenize", json={}), 400)
    check(await client.post("/tokenize", json={"prompt": "SECRET", "messages": CHAT["messages"]}), 400)
    check(await client.post("/detokenize", json={"tokens": [-1]}), 400, param="tokens")
    check(await client.post("/detokenize", json={"tokens": ["SECRET"]}), 400, param="tokens")


@pytest.mark.parametrize("prompt", [["SECRET"] * 129, [[1]] * 129], ids=["texts", "tokens"])
async def test_too_many_prompts_are_a_400_with_the_bound(client: httpx.AsyncClient, prompt: Any) -> None:
    error = check(await client.post("/v1/completions", json=TEXT | {"prompt": prompt}), 400, param="prompt")
    assert "at most 128 prompts" in error["message"]


async def test_many_faults_are_told_as_one(client: httpx.AsyncClient) -> None:
    error = check(await client.post("/v1/completions", json=TEXT | {"prompt": [1.5] * 500_000}), 400, param="prompt")
    assert len(error["message"]) < 500


async def test_empty_messages_are_called_so(client: httpx.AsyncClient) -> None:
    error = check(await client.post("/v1/chat/completions", json=CHAT | {"messages": []}), 400, param="messages")
    assert error["message"] == "messages is empty; give at least one message"


async def test_null_is_the_default(client: httpx.AsyncClient) -> None:
    common = dict.fromkeys(("stream", "ignore_eos", "priority", "logprobs", "stream_options"))
    texts = TEXT | common | dict.fromkeys(("echo", "add_special_tokens"))
    chats = CHAT | common | {"add_generation_prompt": None}
    assert (await client.post("/v1/completions", json=texts)).status_code == 200
    assert (await client.post("/v1/chat/completions", json=chats)).status_code == 200
    check(await client.post("/v1/completions", json={"prompt": None}), 400, code="missing_required_parameter", param="prompt")


async def test_a_compressed_body_is_a_415(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json=TEXT, headers={"content-encoding": "gzip"})
    error = check(response, 415, code="unsupported_encoding")
    assert error["message"] == "Content-Encoding gzip is not supported; send the body uncompressed"
    assert (await client.post("/v1/completions", json=TEXT, headers={"content-encoding": "identity"})).status_code == 200


class TestSmallBodies:
    @pytest.fixture
    def config(self) -> GatewayConfig:
        return GatewayConfig(max_body_bytes=1000)

    async def test_a_long_body_is_a_413(self, client: httpx.AsyncClient) -> None:
        check(await client.post("/v1/completions", json=TEXT | {"prompt": "x" * 2000}), 413, code="request_too_large")

    async def test_a_long_body_without_a_length_is_a_413_too(self, client: httpx.AsyncClient) -> None:
        async def parts() -> Any:
            for _ in range(20):
                yield b"x" * 100

        check(await client.post("/v1/completions", content=parts()), 413, code="request_too_large")


async def test_a_cluster_that_is_not_ready_is_a_503_with_the_reason(client: httpx.AsyncClient, service: Any) -> None:
    service.ready = False
    error = check(await client.post("/v1/completions", json=TEXT), 503, code="not_ready")
    assert "no decode instance is up" in error["message"]
    response = await client.get("/ready")
    assert response.status_code == 503
    assert response.json() == {"ready": False, "reason": "no decode instance is up"}
    service.ready = True
    assert (await client.get("/ready")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_rejection_is_a_429_with_its_reason(
    client: httpx.AsyncClient, service: Any, rejection: Rejected, stream: bool, n: int
) -> None:
    service.script = lambda _: [rejection]
    response = await client.post("/v1/completions", json=TEXT | {"stream": stream, "n": n})
    error = check(response, 429, code="slo_tbt")
    assert response.headers["retry-after"] == "3"
    assert error["retry_after_s"] == 2.3
    assert error["decision"] == {
        "policy": "mooncake",
        "reason": "rejected, decode is full: prefill on p0 by least TTFT among 1: wait 41 s + prefill 1 s after 0 cached tokens"
        " = TTFT 42 s; decode on d0 at TBT 140 ms in a batch of 9",
        "ttft_s": 42.0,
        "tbt_s": 0.14,
    }


FAILURES = [
    (RequestFailed(Fail("r", "no_instance", "no prefill instance is left")), 503, "no_instance"),
    (DeadlineExceeded("no answer in 30 s"), 503, "deadline_exceeded"),
    (ClusterError("the hub is gone"), 503, "cluster_error"),
    (ZeroDivisionError("SECRET"), 500, "internal_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("failure", "status", "code"), FAILURES, ids=[code for *_, code in FAILURES])
async def test_a_failure_before_the_first_token_has_its_status(
    client: httpx.AsyncClient, service: Any, stream: bool, failure: Exception, status: int, code: str
) -> None:
    service.script = lambda _: [failure]
    check(await client.post("/v1/completions", json=TEXT | {"stream": stream}), status, code=code)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_after_the_first_token_ends_a_stream_with_an_error_event(
    client: httpx.AsyncClient, service: Any, stream: bool
) -> None:
    first = Output([SampledToken(5)], cached_tokens=0)
    service.script = lambda _: [first, RequestFailed(Fail("r", "no_instance", "gone"))]
    response = await client.post("/v1/completions", json=TEXT | {"stream": stream})
    if not stream:
        check(response, 503, code="no_instance")
        return
    assert response.status_code == 200
    *_, last = response.text.removesuffix("\n\n").split("\n\n")
    assert '"code":"no_instance"' in last
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("reason", [FinishReason.FAILED, FinishReason.ABORTED])
async def test_an_answer_that_the_cluster_gave_up_is_an_error(
    client: httpx.AsyncClient, service: Any, reason: FinishReason
) -> None:
    service.script = lambda _: [Output([SampledToken(5)], finish_reason=reason)]
    check(await client.post("/v1/completions", json=TEXT), 503)


async def test_an_answer_without_an_end_is_an_error(client: httpx.AsyncClient, service: Any) -> None:
    service.script = lambda _: [Output([SampledToken(5)])]
    check(await client.post("/v1/completions", json=TEXT), 503)


async def test_one_rejected_choice_ends_the_others(client: httpx.AsyncClient, service: Any, rejection: Rejected) -> None:
    first, last = Output([SampledToken(5)], cached_tokens=0), Output([SampledToken(6)], finish_reason=FinishReason.STOP)
    service.script = lambda submission: [rejection] if submission.request_id.endswith("-1") else [first, 5.0, last]
    check(await client.post("/v1/completions", json=TEXT | {"n": 2}), 429)
    assert len(service.aborted) == 1
