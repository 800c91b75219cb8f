"""BlockDirectory: longest prefixes, gaps, nodes that go, against a naive dictionary of sets."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.pool.directory import BlockDirectory, PrefixMatch

KEYS = [bytes([i]) * 16 for i in range(8)]
NODES = ["n0", "n1", "n2"]


def test_each_node_has_its_own_longest_prefix_and_the_longest_is_the_source() -> None:
    directory = BlockDirectory()
    directory.stored("n0", 1, KEYS[:2])
    directory.stored("n1", 1, KEYS[:5])
    assert directory.match(KEYS) == PrefixMatch({"n0": 2, "n1": 5}, 5, "n1")
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
    assert directory.match([]) == directory.match(KEYS[1:]) == PrefixMatch({}, 0, None)


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
    assert directory.match(KEYS) == PrefixMatch({"n1": 1, "n2": 2}, 2, "n2")
    assert directory.holders(KEYS[0]) == ("n2", "n1")
    directory.check()


_keys = st.lists(st.sampled_from(KEYS), max_size=6)
_change = st.tuples(st.sampled_from(["stored", "removed", "inventory", "drop"]), st.sampled_from(NODES), _keys)


@settings(max_examples=200, deadline=None)
@given(changes=st.lists(_change, max_size=25), prompt=st.lists(st.sampled_from(KEYS), max_size=8, unique=True))
def test_it_equals_a_naive_dictionary_of_sets(changes: list[tuple[str, str, list[bytes]]], prompt: list[bytes]) -> None:
    directory = BlockDirectory()
    naive: dict[str, set[bytes]] = {}
    seqs: dict[str, int] = dict.fromkeys(NODES, 0)
    for what, node, keys in changes:
        seqs[node] += 1
        match what:
            case "stored":
                directory.stored(node, seqs[node], keys)
                naive.setdefault(node, set()).update(keys)
            case "removed":
                directory.removed(node, seqs[node], keys)
                naive.setdefault(node, set()).difference_update(keys)
            case "inventory":
                directory.inventory(node, seqs[node], keys)
                naive[node] = set(keys)
            case _:
                directory.drop(node)
                naive.pop(node, None)
                seqs[node] = 0
        directory.check()
    expected = {node: _prefix(prompt, held) for node, held in naive.items() if _prefix(prompt, held)}
    match_ = directory.match(prompt)
    assert match_.blocks == expected
    assert match_.best == max(expected.values(), default=0)
    assert match_.source is None if not expected else match_.on(match_.source or "") == match_.best


def _prefix(prompt: list[bytes], held: set[bytes]) -> int:
    return next((i for i, key in enumerate(prompt) if key not in held), len(prompt))
