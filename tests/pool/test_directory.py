"""BlockDirectory: longest prefixes, gaps, nodes that go, against a naive dictionary of sets."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.core.tier import Tier
from kvasir.pool.directory import BlockDirectory

KEYS = [bytes([i]) * 16 for i in range(8)]
NODES = ["n0", "n1", "n2"]


def test_each_node_has_its_own_longest_prefix_and_the_longest_is_the_source() -> None:
    directory = BlockDirectory()
    directory.stored("n0", 1, KEYS[:2])
    directory.stored("n1", 1, KEYS[:5])
    match = directory.match(KEYS)
    assert (match.blocks, match.best, match.source) == ({"n0": 2, "n1": 5}, 5, "n1")
    assert match.runs == ((directory.bit_of("n0"), 2), (directory.bit_of("n1"), 5))
    directory.check()


def test_a_block_behind_a_hole_does_not_count() -> None:
    directory = BlockDirectory()
    directory.stored("n0", 1, [KEYS[0], KEYS[2]])
    assert directory.match(KEYS).blocks == {"n0": 1}


def test_equal_prefixes_go_to_the_node_that_came_first() -> None:
    directory = BlockDirectory()
    for node in ("n2", "n1"):
        directory.stored(node, 1, KEYS[:3])
    assert directory.match(KEYS[:3]).source == "n2"


def test_no_keys_and_unknown_keys_match_nothing() -> None:
    directory = BlockDirectory()
    directory.stored("n0", 1, KEYS[:1])
    for match in (directory.match([]), directory.match(KEYS[1:])):
        assert (match.blocks, match.best, match.source, match.runs, match.runs_any) == ({}, 0, None, (), ())


def test_a_gap_asks_for_the_inventory_once_and_the_inventory_closes_it() -> None:
    directory = BlockDirectory()
    assert not directory.stored("n0", 1, KEYS[:1])
    assert directory.stored("n0", 3, KEYS[:2])
    assert not directory.stored("n0", 5, KEYS[2:3])
    assert directory.needs_resync("n0")
    directory.inventory("n0", 6, KEYS[:4])
    assert not directory.needs_resync("n0")
    assert not directory.removed("n0", 7, KEYS[3:4])
    assert directory.match(KEYS).blocks == {"n0": 3}


def test_a_first_event_that_is_not_the_first_of_its_node_is_a_gap() -> None:
    directory = BlockDirectory()
    assert directory.stored("n0", 17, KEYS[:1])
    assert directory.stale_nodes == ("n0",)


def test_a_repeated_event_is_not_applied_twice() -> None:
    directory = BlockDirectory()
    for seq, keys in ((1, KEYS[:1]), (2, KEYS[1:2])):
        directory.stored("n0", seq, keys)
    directory.removed("n0", 2, KEYS[:1])
    assert directory.match(KEYS).blocks == {"n0": 2}


def test_a_count_that_starts_again_is_a_pool_that_lost_everything() -> None:
    directory = BlockDirectory()
    for seq in (1, 2, 3):
        directory.stored("n0", seq, KEYS[seq : seq + 1])
    assert not directory.stored("n0", 1, KEYS[:1])
    assert directory.match(KEYS).blocks == {"n0": 1}
    assert len(directory) == 1


def test_a_node_that_is_dropped_leaves_nothing_and_its_bit_is_used_again() -> None:
    directory = BlockDirectory()
    directory.stored("n0", 1, KEYS[:3])
    directory.stored("n1", 1, KEYS[:1])
    directory.drop("n0")
    directory.stored("n2", 1, KEYS[:2])
    match = directory.match(KEYS)
    assert (match.blocks, match.best, match.source) == ({"n1": 1, "n2": 2}, 2, "n2")
    assert directory.holders(KEYS[0]) == ("n2", "n1")
    directory.check()


def test_dram_and_ssd_count_together_for_the_any_measures_only() -> None:
    directory = BlockDirectory()
    directory.stored("n0", 1, KEYS[:2])
    directory.stored("n0", 2, KEYS[2:4], Tier.SSD)
    directory.stored("n1", 1, KEYS[:3])
    match = directory.match(KEYS)
    assert (match.blocks, match.best, match.source) == ({"n0": 2, "n1": 3}, 3, "n1")
    assert (match.blocks_any, match.best_any, match.source_any) == ({"n0": 4, "n1": 3}, 4, "n0")
    assert (match.on("n0"), match.on_any("n0"), match.on_any("n9")) == (2, 4, 0)


def test_a_block_that_left_dram_is_still_on_the_ssd() -> None:
    directory = BlockDirectory()
    directory.stored("n0", 1, KEYS[:2])
    directory.stored("n0", 2, KEYS[:2], Tier.SSD)
    directory.removed("n0", 3, KEYS[:2])
    match = directory.match(KEYS)
    assert (match.best, match.best_any, match.source, match.source_any) == (0, 2, None, "n0")
    assert (directory.holders(KEYS[0]), directory.holders(KEYS[0], Tier.SSD)) == ((), ("n0",))
    directory.removed("n0", 4, KEYS[:2], Tier.SSD)
    assert len(directory) == 0


def test_replicas_are_counted_in_dram() -> None:
    directory = BlockDirectory()
    for node in NODES:
        directory.stored(node, 1, KEYS[:1])
    directory.stored("n3", 1, KEYS[:1], Tier.SSD)
    assert (directory.replicas(KEYS[0]), directory.replicas(KEYS[1])) == (3, 0)


def test_a_match_keeps_the_names_of_its_time_and_the_generation_tells_that_bits_have_moved() -> None:
    directory = BlockDirectory()
    directory.stored("n0", 1, KEYS[:1])
    match, generation = directory.match(KEYS), directory.generation
    directory.drop("n0")
    directory.stored("n1", 1, KEYS[:1])
    assert match.blocks == {"n0": 1}
    assert directory.generation > generation
    assert (directory.bit_of("n0"), directory.bit_of("n1")) == (0, 1)


def test_a_long_prompt_is_matched_to_its_last_block() -> None:
    directory = BlockDirectory()
    keys = [i.to_bytes(16, "big") for i in range(2500)]
    for node, length in (("n0", 2500), ("n1", 500), ("n2", 1507), ("n3", 1)):
        directory.stored(node, 1, keys[:length])
    assert directory.match(keys).blocks == {"n0": 2500, "n1": 500, "n2": 1507, "n3": 1}
    assert [length for _, length in directory.match(keys).runs] == [1, 500, 1507, 2500]
    directory.removed("n0", 2, keys[1000:1001])
    assert directory.match(keys).blocks["n0"] == 1000


_keys = st.lists(st.sampled_from(KEYS), max_size=6)
_change = st.tuples(
    st.sampled_from(["stored", "removed", "inventory", "drop"]),
    st.sampled_from(NODES),
    st.sampled_from(Tier),
    _keys,
    _keys,
)


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(_change, max_size=25), prompt=st.lists(st.sampled_from(KEYS), max_size=8, unique=True))
def test_it_equals_a_naive_dictionary_of_sets(
    changes: list[tuple[str, str, Tier, list[bytes], list[bytes]]], prompt: list[bytes]
) -> None:
    directory = BlockDirectory()
    naive: dict[str, dict[Tier, set[bytes]]] = {node: {tier: set() for tier in Tier} for node in NODES}
    seqs: dict[str, int] = dict.fromkeys(NODES, 0)
    for what, node, tier, keys, others in changes:
        seqs[node] += 1
        match what:
            case "stored":
                directory.stored(node, seqs[node], keys, tier)
                naive[node][tier].update(keys)
            case "removed":
                directory.removed(node, seqs[node], keys, tier)
                naive[node][tier].difference_update(keys)
            case "inventory":
                directory.inventory(node, seqs[node], keys, others)
                naive[node] = {Tier.DRAM: set(keys), Tier.SSD: set(others)}
            case _:
                directory.drop(node)
                naive[node] = {tier: set() for tier in Tier}
                seqs[node] = 0
        directory.check()
    match_ = directory.match(prompt)
    dram = {node: _prefix(prompt, held[Tier.DRAM]) for node, held in naive.items()}
    both = {node: _prefix(prompt, held[Tier.DRAM] | held[Tier.SSD]) for node, held in naive.items()}
    for expected, blocks, best, source, runs in (
        (dram, match_.blocks, match_.best, match_.source, match_.runs),
        (both, match_.blocks_any, match_.best_any, match_.source_any, match_.runs_any),
    ):
        assert blocks == {node: length for node, length in expected.items() if length}
        assert best == max(expected.values())
        assert source is None if not best else expected[source or ""] == best
        assert [length for _, length in runs] == sorted(set(expected.values()) - {0})
        assert {node: length for mask, length in runs for node in match_.names(mask)} == blocks
        assert all(directory.bit_of(node) & mask for mask, _ in runs for node in match_.names(mask))
    assert len(directory) == len({key for held in naive.values() for keys in held.values() for key in keys})
    for key in KEYS:
        assert directory.replicas(key) == sum(key in held[Tier.DRAM] for held in naive.values())


def _prefix(prompt: list[bytes], held: set[bytes]) -> int:
    return next((i for i, key in enumerate(prompt) if key not in held), len(prompt))
