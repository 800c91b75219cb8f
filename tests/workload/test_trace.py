"""Reading Mooncake traces: what is accepted, what is repaired, and what every refusal says."""

import pytest

from kvasir.core.errors import TraceError
from kvasir.workload.trace import TraceRequest, read_trace, trace_lines

GOOD = '{"timestamp": 3000, "input_length": 600, "output_length": 50, "hash_ids": [0, 7]}'


def test_a_line_becomes_a_request_in_seconds_and_tokens() -> None:
    trace = read_trace([GOOD])
    assert trace.requests == (TraceRequest(3.0, 600, 50, (0, 7)),)
    assert trace.block_tokens == 512
    assert trace.num_unsorted == 0


def test_blank_lines_and_unknown_fields_are_skipped() -> None:
    trace = read_trace(["\n", GOOD.replace("{", '{"chat_id": 4, ') + "\n", "  \n"])
    assert len(trace.requests) == 1


def test_unsorted_timestamps_are_sorted_stably_and_counted() -> None:
    lines = [GOOD.replace("3000", str(ms)).replace("50", str(n)) for ms, n in ((0, 1), (9, 2), (3, 3), (9, 4), (3, 5))]
    trace = read_trace(lines)
    assert [r.output_tokens for r in trace.requests] == [1, 3, 5, 2, 4]
    assert trace.num_unsorted == 2


def test_writing_and_reading_gives_the_same_requests() -> None:
    trace = read_trace([GOOD, GOOD.replace("3000", "3001.5")])
    assert read_trace(trace_lines(trace.requests)) == trace


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "trace line 2: got '{not json', expected a JSON object"),
        ("[1, 2]", "trace line 2: got [1, 2], expected a JSON object"),
        ("null", "trace line 2: got None, expected a JSON object"),
        (GOOD.replace('"timestamp": 3000, ', ""), "trace line 2: timestamp: got nothing, expected milliseconds >= 0"),
        (
            GOOD.replace(', "hash_ids": [0, 7]', ""),
            "trace line 2: hash_ids: got nothing, expected a list of integers from 0 to 2**64 - 1",
        ),
        (GOOD.replace("600", '"600"'), "trace line 2: input_length: got '600', expected an integer >= 1"),
        (GOOD.replace("600", "600.5"), "trace line 2: input_length: got 600.5, expected an integer >= 1"),
        (GOOD.replace("600", "true"), "trace line 2: input_length: got True, expected an integer >= 1"),
        (GOOD.replace("3000", "-1"), "trace line 2: timestamp: got -1.0, expected milliseconds >= 0"),
        (GOOD.replace("3000", "null"), "trace line 2: timestamp: got None, expected milliseconds >= 0"),
        (GOOD.replace("600", "-600"), "trace line 2: input_length: got -600, expected an integer >= 1"),
        (GOOD.replace("600", "0").replace("0, 7", ""), "trace line 2: input_length: got 0, expected an integer >= 1"),
        (GOOD.replace("50,", "0,"), "trace line 2: output_length: got 0, expected an integer >= 1"),
        (GOOD.replace("50,", "-3,"), "trace line 2: output_length: got -3, expected an integer >= 1"),
        (GOOD.replace("0, 7", "0, -7"), "trace line 2: hash_ids: got (0, -7), expected a list of integers from 0 to 2**64 - 1"),
        (
            GOOD.replace("0, 7", f"0, {2**64}"),
            f"trace line 2: hash_ids: got (0, {2**64}), expected a list of integers from 0 to 2**64 - 1",
        ),
        (
            GOOD.replace("0, 7", '0, "7"'),
            "trace line 2: hash_ids: got [0, '7'], expected a list of integers from 0 to 2**64 - 1",
        ),
        (GOOD.replace("0, 7", "0"), "trace line 2: hash_ids: got 1 blocks, expected 2 = ceil(input_length 600 / 512)"),
        (GOOD.replace("0, 7", ""), "trace line 2: hash_ids: got 0 blocks, expected 2 = ceil(input_length 600 / 512)"),
        (GOOD.replace("0, 7", "0, 7, 8"), "trace line 2: hash_ids: got 3 blocks, expected 2 = ceil(input_length 600 / 512)"),
    ],
)
def test_a_bad_line_is_refused_in_one_line(line: str, message: str) -> None:
    with pytest.raises(TraceError) as caught:
        read_trace([GOOD, line])
    assert str(caught.value) == message


def test_a_line_that_is_not_text_is_refused() -> None:
    with pytest.raises(TraceError, match=r"^trace line 1: got b'\\xff.*expected a JSON object$"):
        read_trace([b"\xff\xfe\x00"])


def test_a_long_bad_line_is_shortened_in_the_message() -> None:
    with pytest.raises(TraceError) as caught:
        read_trace(["x" * 10_000])
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("lines", [[], ["", "\n"]])
def test_an_empty_trace_is_refused(lines: list[str]) -> None:
    with pytest.raises(TraceError, match="trace is empty"):
        read_trace(lines)
