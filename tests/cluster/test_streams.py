"""Which prefix can follow a prefill to the node that will decode."""

from __future__ import annotations

from kvasir.cluster.streams import Followers, HandOffStreams

KEYS = (b"a", b"b", b"c", b"d")


def streams(cached: int = 0) -> HandOffStreams:
    found = HandOffStreams()
    found.begin("r", "p", "d", KEYS, cached=cached, tenant="t")
    return found


def test_a_prefix_follows_as_far_as_it_has_no_gap() -> None:
    found = streams()
    assert list(found.stored("p", {b"b"}.__contains__)) == [], "b cannot be read without a"
    assert list(found.stored("p", {b"a", b"b"}.__contains__)) == [Followers("d", (b"a", b"b"), "t")]
    assert list(found.stored("p", {b"a", b"b", b"x"}.__contains__)) == [], "that is known"
    assert list(found.stored("p", {*KEYS}.__contains__)) == [Followers("d", KEYS, "t")]


def test_what_was_cached_follows_with_the_first_block_that_is_computed() -> None:
    assert list(streams(cached=2).stored("p", {b"c"}.__contains__)) == [Followers("d", (b"a", b"b", b"c"), "t")]


def test_other_nodes_blocks_and_those_after_the_end_make_nothing_follow() -> None:
    found = streams()
    assert list(found.stored("q", {*KEYS}.__contains__)) == []
    found.end("r")
    found.end("r")
    assert list(found.stored("p", {*KEYS}.__contains__)) == []


def test_a_prefill_that_begins_again_elsewhere_streams_from_there() -> None:
    found = streams()
    found.begin("r", "q", "d", KEYS, cached=0, tenant="")
    assert list(found.stored("p", {*KEYS}.__contains__)) == []
    assert list(found.stored("q", {b"a"}.__contains__)) == [Followers("d", (b"a",), "")]
