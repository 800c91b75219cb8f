"""The streaming client's parsers: HTTP/1.1 and SSE in any cut, and the meaning of completion events."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.cli.replay.completion import Endpoint, StreamReading, error_code_of_body, request_body
from kvasir.cli.replay.http import Disconnected, ProtocolError, ResponseParser, Server
from kvasir.cli.replay.sse import SseParser
from kvasir.core.errors import ConfigError

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n7;x=y\r\n, world\r\n0\r\n\r\n"
SIZED = b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\nhello, world"
UNTIL_CLOSE = b"HTTP/1.0 200 OK\r\n\r\nhello, world"


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


CUTS = st.lists(st.integers(0, 200), max_size=8)


@given(st.sampled_from([CHUNKED, SIZED, UNTIL_CLOSE]), CUTS)
def test_a_response_reads_the_same_however_it_is_cut(response: bytes, cuts: list[int]) -> None:
    parser = ResponseParser()
    body = b"".join(parser.feed(piece) for piece in pieces(response, cuts))
    parser.feed_eof()
    assert (parser.status, body, parser.is_done) == (200, b"hello, world", True)


@pytest.mark.parametrize("response", [b"", b"HTTP/1.1 200", CHUNKED[:-5], SIZED[:-1]])
def test_a_response_that_breaks_off_is_noticed(response: bytes) -> None:
    parser = ResponseParser()
    parser.feed(response)
    with pytest.raises(Disconnected):
        parser.feed_eof()


@pytest.mark.parametrize(
    "response",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        CHUNKED.replace(b"5\r\n", b"z\r\n"),
        CHUNKED.replace(b"5\r\n", b"-5\r\n"),
        SIZED.replace(b"12", b"-1"),
        b"x" * 70_000,
    ],
)
def test_what_is_not_http_is_refused(response: bytes) -> None:
    with pytest.raises(ProtocolError):
        ResponseParser().feed(response)


@given(CUTS)
def test_events_read_the_same_however_they_are_cut(cuts: list[int]) -> None:
    stream = b': keep-alive\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata: two\ndata:lines\n\ndata: [DONE]\n\ndata: never ended'
    parser = SseParser()
    events = [event for piece in pieces(stream, cuts) for event in parser.feed(piece)]
    assert events == [b'{"a": 1}', b"two\nlines", b"[DONE]"]


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, ""),
        ("http://localhost:8000/v1/", "localhost", 8000, ""),
        ("https://example.org/kvasir/v1", "example.org", 443, "/kvasir"),
        ("http://[::1]:9", "::1", 9, ""),
    ],
)
def test_a_url_says_where_the_server_is(url: str, host: str, port: int, path: str) -> None:
    server = Server.parse(url)
    assert (server.host, server.port, server.path) == (host, port, path)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://a:port", "http://a:99999"])
def test_what_is_not_a_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="not a URL"):
        Server.parse(url)


def read(*events: object) -> StreamReading:
    reading = StreamReading()
    for i, event in enumerate(events):
        reading.read(event if isinstance(event, bytes) else msgspec.json.encode(event), float(i))
    return reading


def text(words: str, finish: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": words, "finish_reason": finish}]}


def delta(**fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def usage(**counts: object) -> dict[str, object]:
    return {"choices": [], "usage": counts}


def test_every_event_with_output_is_a_token_where_the_server_counts_none() -> None:
    assert read(text("a"), text(""), text("b"), text("", "length"), b"[DONE]").token_times_s() == (0.0, 1.0, 2.0)


def test_tokens_of_one_event_share_its_time_by_the_servers_count() -> None:
    reading = read(text("a"), text("bbb"), text("c"), usage(prompt_tokens=9, completion_tokens=5))
    assert reading.token_times_s() == (0.0, 1.0, 1.0, 1.0, 2.0)


def test_fewer_tokens_than_events_drops_the_last_events() -> None:
    assert read(text("a"), text("b"), text("c"), usage(completion_tokens=2)).token_times_s() == (0.0, 1.0)


def test_a_chat_starts_with_its_first_content_and_not_with_its_role() -> None:
    events = (delta(role="assistant", content=""), delta(content="x"), delta(reasoning_content="y"), delta())
    assert read(*events).token_times_s() == (1.0, 2.0)


def test_usage_tells_prompt_cached_and_output_tokens() -> None:
    reading = read(usage(prompt_tokens=9, completion_tokens=5, prompt_tokens_details={"cached_tokens": 4}))
    assert (reading.num_prompt_tokens, reading.num_output_tokens, reading.num_cached_tokens) == (9, 5, 4)


def test_missing_usage_details_are_unknown_and_not_zero() -> None:
    assert read(usage(prompt_tokens=9, completion_tokens=5, prompt_tokens_details=None)).num_cached_tokens is None


def test_an_error_event_is_remembered_by_its_code() -> None:
    assert read(text("a"), {"error": {"message": "x", "code": "decode_lost"}}).error == "decode_lost"
    assert read({"error": "sorry"}).error == "stream_error"
    assert read(b"{half").error == "bad_event"


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(0, 200))
def test_token_times_are_as_many_as_the_server_counts_and_never_go_back(lengths: list[int], num_tokens: int) -> None:
    reading = read(*[text("x" * n) for n in lengths], usage(completion_tokens=num_tokens))
    times = reading.token_times_s()
    assert len(times) == max(1, num_tokens)
    assert list(times) == sorted(times)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"error": {"message": "m", "type": "overloaded", "code": "ttft_slo"}}', "ttft_slo"),
        (b'{"error": {"message": "m", "type": "overloaded", "code": null}}', "overloaded"),
        (b'{"code": "bare"}', "bare"),
        (b'{"error": {"code": 429}}', "http_429"),
        (b"[]", "http_429"),
        (b"<html>", "http_429"),
        (b"", "http_429"),
    ],
)
def test_a_refusal_has_a_reason_whatever_its_body(body: bytes, code: str) -> None:
    assert error_code_of_body(body, "http_429") == code


def test_a_completion_asks_for_token_ids_and_usage() -> None:
    body = msgspec.json.decode(request_body(Endpoint.COMPLETIONS, "m", [5, 6], 7, ignore_eos=True))
    assert (body["prompt"], body["max_tokens"], body["stream"], body["ignore_eos"]) == ([5, 6], 7, True, True)
    assert body["stream_options"] == {"include_usage": True}


def test_a_chat_asks_in_words_and_leaves_out_extensions_on_request() -> None:
    body = msgspec.json.decode(request_body(Endpoint.CHAT, "m", [0, 1], 7, ignore_eos=False))
    assert body["messages"] == [{"role": "user", "content": "time year"}]
    assert "ignore_eos" not in body
