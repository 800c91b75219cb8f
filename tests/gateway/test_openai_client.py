"""A real server and the real openai client, sync and async."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from msgspec.structs import replace

from kvasir.cluster.service import Rejected

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def api(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api:
        yield api


@pytest.fixture
def sync_api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api:
        yield api


async def test_sync(sync_api: openai.OpenAI) -> None:
    answer = await asyncio.to_thread(sync_api.chat.completions.create, model="tiny", messages=MESSAGES)
    assert answer.choices[0].message.content == "the quick brown fox"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_sync_stream(sync_api: openai.OpenAI) -> None:
    def read() -> str:
        stream = sync_api.completions.create(model="tiny", prompt="hi", stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    assert await asyncio.to_thread(read) == "the quick brown fox"


async def test_async_stream_with_usage(api: openai.AsyncOpenAI) -> None:
    stream = await api.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, n=2, stream_options={"include_usage": True}
    )
    texts, usage = ["", ""], None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["the quick brown fox"] * 2
    assert usage is not None
    assert usage.completion_tokens == 8


async def test_models(api: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in api.models.list()] == ["tiny"]


async def test_chat_logprobs_parse(api: openai.AsyncOpenAI) -> None:
    answer = await api.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == "the quick brown fox"
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2] * 4
    assert logprobs.content[0].bytes == list(b"the")


async def test_streamed_chat_logprobs_parse(api: openai.AsyncOpenAI) -> None:
    stream = await api.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, stream=True)
    entries = [
        entry
        async for chunk in stream
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert [entry.top_logprobs for entry in entries] == [[]] * 4


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs_parse(api: openai.AsyncOpenAI, stream: bool) -> None:
    if stream:
        chunks = [c async for c in await api.completions.create(model="tiny", prompt="hi", logprobs=2, stream=True)]
        parts = [chunk.choices[0].logprobs for chunk in chunks]
    else:
        parts = [(await api.completions.create(model="tiny", prompt="hi", logprobs=2)).choices[0].logprobs]
    tokens = [token for part in parts if part is not None for token in part.tokens or []]
    offsets = [offset for part in parts if part is not None for offset in part.text_offset or []]
    tops = [top for part in parts if part is not None for top in part.top_logprobs or []]
    assert tokens == ["the", " quick", " brown", " fox"]
    assert offsets == [0, 3, 9, 15]
    assert all(len(top) == 2 and token in top for token, top in zip(tokens, tops, strict=True))


async def test_errors_become_the_clients_exceptions(api: openai.AsyncOpenAI, service: Any, rejection: Rejected) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await api.completions.create(model="tiny", prompt="hi", temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        await api.completions.create(model="other", prompt="hi")
    service.script = lambda _: [rejection]
    with pytest.raises(openai.RateLimitError) as limited:
        await api.completions.create(model="tiny", prompt="hi", stream=True)
    assert limited.value.code == "slo_tbt"
    assert limited.value.response.headers["retry-after"] == "3"


async def test_an_error_in_a_stream_is_raised_by_the_client(api: openai.AsyncOpenAI, service: Any, rejection: Rejected) -> None:
    outputs = service.script
    service.script = lambda submission: [*list(outputs(submission))[:2], rejection]
    stream = await api.completions.create(model="tiny", prompt="hi", stream=True)
    with pytest.raises(openai.APIError, match="predicted TBT 140 ms"):
        async for _ in stream:
            pass


async def test_a_client_that_obeys_retry_after_succeeds(url: str, service: Any, rejection: Rejected) -> None:
    soon = Rejected(replace(rejection.reject, retry_after_s=0.1))
    outputs, answers = service.script, iter([[soon], None])
    service.script = lambda submission: next(answers) or outputs(submission)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1) as api:
        answer = await api.completions.create(model="tiny", prompt="hi")
    assert answer.choices[0].text == "the quick brown fox"
