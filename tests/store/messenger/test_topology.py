"""Who is asked first for a block."""

from __future__ import annotations

from kvasir.store.messenger import Place, Topology
from kvasir.store.messenger.topology import Distance


def test_within_a_host_first_then_the_fastest_link_then_the_same_rack() -> None:
    topology = Topology(
        {
            "me": Place("h0", "a", 10e9),
            "host": Place("h0", "a", 1e9),
            "far and fast": Place("h1", "b", 10e9),
            "near and fast": Place("h2", "a", 25e9),
            "near and slow": Place("h3", "a", 1e9),
        }
    )
    nodes = ["unknown", "near and slow", "far and fast", "near and fast", "host"]
    assert topology.nearest_first("me", nodes) == ["host", "near and fast", "far and fast", "unknown", "near and slow"]


def test_the_slower_link_of_two_counts_and_what_is_not_declared_is_guessed_by_distance() -> None:
    topology = Topology({"a": Place("h0", "r"), "b": Place("h1", "r", 1e9), "c": Place("h2", "r"), "d": Place("h3", "s", 9e9)})
    assert topology.bytes_s("a", "b") == topology.bytes_s("b", "a") == 1e9
    assert topology.bytes_s("a", "c") == topology.rack_bytes_s
    assert topology.bytes_s("a", "d") == topology.bytes_s("a", "nowhere") == topology.cluster_bytes_s
    assert topology.distance("a", "nowhere") is Distance.CLUSTER
