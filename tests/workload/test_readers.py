"""Other people's traces: found by content, read into requests, refused in one line."""

from __future__ import annotations

import json
import statistics

import pytest

from kvasir.core.errors import ConfigError, TraceError
from kvasir.workload.readers import Options, read_any
from kvasir.workload.trace import Trace

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:17:03.9799600,4808,10",
    "2023-11-16 18:17:04.0319600,3180,8",
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2024-05-10 00:00:00.009930+00:00,2162,5",
    "2024-05-10 00:00:01+00:00,9,1",
)
BURST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
    "5,ChatGPT,472,18,490,Conversation log",
    "45,ChatGPT,1087,0,1087,Conversation log",
    "118,GPT-4,417,276,693,API log",
)
MOONCAKE = ('{"timestamp": 0, "input_length": 600, "output_length": 50, "hash_ids": [0, 7]}',)


def lines(*texts: str) -> list[bytes]:
    return [f"{text}\n".encode() for text in texts]


def read(*texts: str) -> Trace:
    return read_any(lines(*texts))


def conversation(*turns: tuple[str, int]) -> dict[str, object]:
    """Turns by speaker and number of tokens (of 4 characters)."""
    return {"id": "c", "conversations": [{"from": speaker, "value": "word" * tokens} for speaker, tokens in turns]}


def sharegpt(*conversations: dict[str, object], **options: float) -> Trace:
    raw = json.dumps(list(conversations), indent=1).encode().splitlines(keepends=True)
    return read_any(raw, Options(rate=options.get("rate", 1.0), seed=int(options.get("seed", 0))))


def test_mooncake_lines_are_read_as_before() -> None:
    trace = read("", *MOONCAKE)
    assert trace.requests[0].hash_ids == (0, 7)
    assert trace.unknown == ()


def test_azure_times_count_from_the_first_arrival() -> None:
    trace = read(*AZURE)
    assert [(r.input_tokens, r.output_tokens) for r in trace.requests] == [(4808, 10), (3180, 8)]
    assert [r.arrival_s for r in trace.requests] == pytest.approx([0.0, 0.052], abs=1e-6)
    assert [r.arrival_s for r in read(*AZURE_2024).requests] == pytest.approx([0.0, 0.99007], abs=1e-6)


def test_without_hash_ids_no_prompt_shares_a_block_and_the_trace_says_so() -> None:
    trace = read(*AZURE)
    first, second = (r.hash_ids for r in trace.requests)
    assert (len(first), len(second)) == (10, 7)
    assert not set(first) & set(second)
    assert trace.unknown[0].startswith("prefix sharing: no hash_ids")


def test_burstgpt_failures_are_dropped_and_counted() -> None:
    trace = read(*BURST)
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in trace.requests] == [(0.0, 472, 18), (113.0, 417, 276)]
    assert trace.num_dropped == 1


def test_a_clock_that_counts_from_1970_is_set_to_the_first_arrival() -> None:
    lines = (f'{{"timestamp":{at},"input_length":5,"output_length":2,"hash_ids":[1]}}' for at in (1700000000000, 1700000003000))
    assert [r.arrival_s for r in read(*lines).requests] == [0.0, 3.0]


def test_burstgpt_with_its_later_columns_is_read_too() -> None:
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
    assert read(header, "3.0,s,1.2,GPT-4,100,10.0,110,API log").requests[0].output_tokens == 10


@pytest.mark.parametrize("texts", [AZURE, BURST])
def test_unsorted_rows_are_sorted_and_counted(texts: tuple[str, ...]) -> None:
    trace = read(texts[0], *reversed(texts[1:]))
    assert trace.num_unsorted == 1
    assert [r.arrival_s for r in trace.requests] == sorted(r.arrival_s for r in trace.requests)


def test_a_byte_order_mark_and_carriage_returns_do_no_harm() -> None:
    assert len(read_any([b"\xef\xbb\xbf" + AZURE[0].encode() + b"\r\n", AZURE[1].encode() + b"\r\n"]).requests) == 1


def test_a_sharegpt_turn_shares_the_whole_blocks_of_the_turns_before_it() -> None:
    trace = sharegpt(conversation(("human", 1000), ("gpt", 200), ("human", 400), ("gpt", 50)))
    first, second = trace.requests
    assert (first.input_tokens, first.output_tokens) == (1000, 200)
    assert (second.input_tokens, second.output_tokens) == (1600, 50)
    assert first.hash_ids[:1] == second.hash_ids[:1]
    assert first.hash_ids[1] not in second.hash_ids
    assert (len(first.hash_ids), len(second.hash_ids)) == (2, 4)


def test_sharegpt_conversations_share_nothing_with_one_another() -> None:
    one = conversation(("system", 600), ("human", 10), ("gpt", 5))
    first, second = sharegpt(one, one).requests
    assert not set(first.hash_ids) & set(second.hash_ids)


def test_a_sharegpt_turn_comes_after_the_answer_before_it() -> None:
    turns = [turn for _ in range(20) for turn in (("human", 10), ("gpt", 300))]
    trace = sharegpt(conversation(*turns), rate=1000.0)
    inputs = [r.input_tokens for r in trace.requests]
    assert inputs == sorted(inputs)
    assert min(b.arrival_s - a.arrival_s for a, b in zip(trace.requests, trace.requests[1:], strict=False)) >= 300 * 0.03


def test_sharegpt_arrivals_follow_rate_and_seed() -> None:
    many = [conversation(("human", 10), ("gpt", 5))] * 2000
    trace = sharegpt(*many, rate=4.0)
    gaps = [b.arrival_s - a.arrival_s for a, b in zip(trace.requests, trace.requests[1:], strict=False)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)
    assert sharegpt(*many, rate=4.0) == trace != sharegpt(*many, rate=4.0, seed=1)


def test_sharegpt_says_what_it_made_up_and_counts_what_it_left_out() -> None:
    trace = sharegpt(conversation(("gpt", 9), ("human", 10), ("gpt", 0), ("gpt", 5)))
    assert [text.partition(":")[0] for text in trace.unknown] == ["arrival times", "prefix sharing", "token counts"]
    assert trace.num_dropped == 2
    assert len(trace.requests) == 1


def test_a_tokenizer_replaces_the_estimate() -> None:
    raw = json.dumps([conversation(("human", 10), ("gpt", 5))]).encode()
    trace = read_any([raw], Options(count_tokens=len))
    assert trace.requests[0].input_tokens == 40
    assert not any("token counts" in text for text in trace.unknown)


def test_sharegpt_as_one_object_a_line_is_read_too() -> None:
    assert len(read(*[json.dumps(conversation(("human", 10), ("gpt", 5)))] * 3).requests) == 3


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((AZURE[0], "yesterday,1,1"), "TIMESTAMP: got 'yesterday', expected a time such as 2023-11-16 18:17:03.9799600"),
        ((*AZURE[:2], "2023-11-16 18:17:04,0,8"), "trace line 3: ContextTokens: got '0', expected an integer >= 1"),
        ((*AZURE[:2], "2023-11-16 18:17:04,8"), "trace line 3: GeneratedTokens: got '', expected an integer >= 1"),
        ((*AZURE[:2], "2023-11-16 18:17:04,8,0"), "trace line 3: GeneratedTokens: got '0', expected an integer >= 1"),
        ((BURST[0], "-5,m,1,1,2,x"), "trace line 2: Timestamp: got '-5', expected seconds >= 0"),
        ((BURST[0], "5,m,1.5,1,2,x"), "trace line 2: Request tokens: got '1.5', expected an integer >= 1"),
        ((BURST[0], "5,m,1,-1,2,x"), "trace line 2: Response tokens: got '-1', expected an integer >= 0"),
        ((BURST[0], "nan,m,1,1,2,x"), "trace line 2: Timestamp: got 'nan', expected seconds >= 0"),
        ((BURST[0], BURST[2]), "trace is empty: got 1 failures and no request with a response"),
        (AZURE[:1], "trace is empty: got a header and no requests"),
        (("when,what", "1,2"), "trace line 1: got 'when,what', which begins none of: Mooncake JSONL"),
        (("a\rb\r{",), "trace line 1: got 'a\\rb\\r{', which begins none of: Mooncake JSONL"),
        (("", " "), "trace is empty: got no requests"),
        (("[1, 2]",), "trace conversation 1: conversations: got nothing, expected a list of turns"),
        (("[{",), "trace is not ShareGPT JSON"),
        (("[]",), "trace is empty: got no conversation with an answer"),
        (('[{"conversations": [{"from": "gpt"}]}]',), "trace conversation 1, turn 1: value: got nothing, expected a text"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(TraceError) as caught:
        read(*texts)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_name_their_line() -> None:
    with pytest.raises(TraceError, match=r"trace line 2: .* expected text in UTF-8"):
        read_any([AZURE[0].encode() + b"\n", b"\xff\xfe,1,1\n"])


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a rate: 0"):
        sharegpt(conversation(("human", 10), ("gpt", 5)), rate=0.0)
