"""Plain and streamed answers, in both of OpenAI's shapes, over the bare application."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from kvasir.cluster.service import Output
from kvasir.core.request import FinishReason
from kvasir.gateway.tokenizer import Tokenizer

Answer = dict[str, Any]
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 64}


async def post(client: httpx.AsyncClient, path: str, body: Answer) -> Answer:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: Answer = response.json()
    return answer


async def events(client: httpx.AsyncClient, path: str, body: Answer) -> list[Answer]:
    """The events of a stream, without the last one, `[DONE]`."""
    response = await client.post(path, json=body | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    *chunks, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


async def test_a_completion_has_text_reason_and_usage(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/v1/completions", TEXT)
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "the quick brown fox", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_a_chat_answer_is_a_message(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/v1/chat/completions", CHAT)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "the quick brown fox", "refusal": None}


async def test_streamed_text_joins_to_the_plain_text(client: httpx.AsyncClient) -> None:
    chunks = await events(client, "/v1/completions", TEXT)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "the quick brown fox"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert "usage" not in chunks[0]


async def test_a_chat_stream_opens_with_the_role(client: httpx.AsyncClient) -> None:
    chunks = await events(client, "/v1/chat/completions", CHAT)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == "the quick brown fox"


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)])
async def test_usage_comes_in_a_last_chunk_without_choices(client: httpx.AsyncClient, path: str, body: Answer) -> None:
    *chunks, last = await events(client, path, body | {"stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["hi"]),
        (["hi", "lazy dog"], ["hi", "lazy dog"]),
        ([0, 1, 2], [[0, 1, 2]]),
        ([[0, 1], [2]], [[0, 1], [2]]),
    ],
)
async def test_a_prompt_is_text_or_tokens_or_a_list_of_either(
    client: httpx.AsyncClient, service: Any, tokenizer: Tokenizer, prompt: Any, expected: list[str | list[int]]
) -> None:
    answer = await post(client, "/v1/completions", TEXT | {"prompt": prompt})
    wanted = [tokenizer.encode(p) if isinstance(p, str) else p for p in expected]
    assert sorted(submission.prompt for submission in service.submitted) == sorted(wanted)
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, wanted))


async def test_sampling_reaches_the_cluster(client: httpx.AsyncClient, service: Any) -> None:
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 11, "ignore_eos": True, "stop_token_ids": [5], "priority": 2}
    await post(client, "/v1/completions", TEXT | asked | {"cache_salt": "mine"})
    (submission,) = service.submitted
    sampling = submission.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 11)
    assert (submission.max_tokens, submission.ignore_eos, submission.stop_tokens) == (64, True, (5,))
    assert (submission.salt, submission.priority) == ("mine", 2)


@pytest.mark.parametrize(("asked", "granted"), [({}, 16), ({"max_tokens": 5}, 5)])
async def test_a_completion_has_16_tokens_unless_told(
    client: httpx.AsyncClient, service: Any, asked: Answer, granted: int
) -> None:
    await post(client, "/v1/completions", {"model": "tiny", "prompt": [1]} | asked)
    assert service.submitted[0].max_tokens == granted


@pytest.mark.parametrize("asked", [{}, {"max_tokens": 7}, {"max_completion_tokens": 9, "max_tokens": 7}])
async def test_a_chat_may_fill_the_context_unless_told(client: httpx.AsyncClient, service: Any, asked: Answer) -> None:
    await post(client, "/v1/chat/completions", CHAT | asked)
    (submission,) = service.submitted
    room = service.spec.max_model_len - len(submission.prompt)
    assert submission.max_tokens == asked.get("max_completion_tokens", asked.get("max_tokens", room))


async def test_further_choices_wait_for_the_first_token_and_have_their_own_seed(
    client: httpx.AsyncClient, service: Any, says: Callable[..., Any]
) -> None:
    seen_before_first: list[int] = []

    def script(submission: Any) -> Any:
        seen_before_first.append(len(service.submitted))
        return says("the lazy dog", gap_s=0.01, cached=3)(submission)

    service.script = script
    answer = await post(client, "/v1/chat/completions", CHAT | {"n": 3, "seed": 40})
    assert seen_before_first[0] == 1
    assert [submission.sampling.seed for submission in service.submitted] == [40, 41, 42]
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["the lazy dog"] * 3
    assert answer["usage"]["completion_tokens"] == 9
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


async def test_each_choice_of_a_stream_is_whole(client: httpx.AsyncClient) -> None:
    chunks = await events(client, "/v1/completions", TEXT | {"n": 2, "prompt": ["hi", "fox"]})
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert set(texts.values()) == {"the quick brown fox"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_across_tokens_ends_the_answer_before_it(
    client: httpx.AsyncClient, service: Any, stream: bool
) -> None:
    body = TEXT | {"stop": ["nothing like it", "ick br"]}
    if stream:
        chunks = await events(client, "/v1/completions", body)
        text, reason = "".join(c["choices"][0]["text"] for c in chunks), chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = (await post(client, "/v1/completions", body))["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
    assert (text, reason) == ("the qu", "stop")
    assert service.aborted, "the rest of the answer must not be computed"


async def test_the_token_that_ends_an_answer_is_counted_but_not_shown(
    client: httpx.AsyncClient, service: Any, says: Callable[..., Any], tokenizer: Tokenizer
) -> None:
    service.script = says("the fox dog")
    dog = tokenizer.encode(" dog")
    answer = await post(client, "/v1/completions", TEXT | {"stop_token_ids": dog})
    assert answer["choices"][0]["text"] == "the fox"
    assert answer["usage"]["completion_tokens"] == 3


async def test_special_tokens_have_no_text(client: httpx.AsyncClient, service: Any, says: Callable[..., Any]) -> None:
    service.script = says("the fox<|im_end|>")
    answer = await post(client, "/v1/chat/completions", CHAT)
    assert answer["choices"][0]["message"]["content"] == "the fox"


async def test_characters_are_never_cut_in_a_stream(client: httpx.AsyncClient, service: Any, says: Callable[..., Any]) -> None:
    service.script = says("snö ❄️ 🐦‍⬛")
    chunks = await events(client, "/v1/completions", TEXT)
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == "snö ❄️ 🐦‍⬛"
    assert "\ufffd" not in "".join(texts)


async def test_several_tokens_in_one_output_are_one_chunk(
    client: httpx.AsyncClient, service: Any, tokenizer: Tokenizer, says: Callable[..., Any]
) -> None:
    tokens = [output.tokens[0] for output in says("the quick brown fox")(_like(service)) if isinstance(output, Output)]
    service.script = lambda _: [Output(tokens[:3], cached_tokens=0), Output(tokens[3:], finish_reason=FinishReason.LENGTH)]
    chunks = await events(client, "/v1/completions", TEXT)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["the quick brown", " fox"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def _like(service: Any) -> Any:
    from kvasir.cluster.service import Submission
    from kvasir.core.request import Sampling

    return Submission(request_id="r", prompt=[1], max_tokens=4, sampling=Sampling())


@pytest.mark.parametrize("n", [1, 3])
async def test_an_answer_without_a_token_is_empty_and_keeps_nobody_waiting(
    client: httpx.AsyncClient, service: Any, n: int
) -> None:
    service.script = lambda _: [Output([], cached_tokens=0, finish_reason=FinishReason.LENGTH)]
    answer = await post(client, "/v1/completions", TEXT | {"n": n})
    assert [choice["text"] for choice in answer["choices"]] == [""] * n
    assert answer["usage"]["completion_tokens"] == 0


async def test_the_model_may_be_left_out(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/v1/chat/completions", {"messages": CHAT["messages"]})
    assert answer["model"] == "tiny"


async def test_the_card_tells_context_and_vocabulary(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    (card,) = (await client.get("/v1/models")).json()["data"]
    assert (card["id"], card["root"], card["max_model_len"], card["vocab_size"]) == ("tiny", "tiny", 512, tokenizer.vocab_size)
    assert (await client.get("/v1/models/tiny")).json() == card


async def test_docs_describe_the_bodies(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    assert "cache_salt" in schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert (await client.get("/docs")).status_code == 200


async def test_health_and_version_always_answer(client: httpx.AsyncClient, service: Any) -> None:
    service.ready = False
    assert (await client.get("/health")).status_code == 200
    assert (await client.head("/health")).status_code == 200
    assert (await client.head("/ready")).status_code == 503
    assert (await client.get("/version")).json()["version"]


async def test_tokenize_and_detokenize_are_inverse(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/tokenize", {"model": "tiny", "prompt": "the quick snö", "return_token_strs": True})
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    assert await post(client, "/detokenize", {"tokens": answer["tokens"]}) == {"prompt": "the quick snö"}


async def test_tokenize_counts_a_chat_as_the_chat_endpoint_does(client: httpx.AsyncClient, service: Any) -> None:
    answer = await post(client, "/tokenize", {"messages": CHAT["messages"]})
    await post(client, "/v1/chat/completions", CHAT)
    assert answer["tokens"] == service.submitted[0].prompt


async def test_text_parts_of_a_message_are_joined(client: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "fox"}]
    one = await post(client, "/tokenize", {"messages": [{"role": "user", "content": parts}]})
    other = await post(client, "/tokenize", {"messages": [{"role": "user", "content": "the\nfox"}]})
    assert one["tokens"] == other["tokens"]
