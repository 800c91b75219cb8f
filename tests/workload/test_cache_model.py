"""The LRU cache model against a naive one and by hand; the replay of a prefix cache by hand."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvasir.workload.cache_model import HitRate, hit_rates, lru_hit_curve, lru_hit_rate
from kvasir.workload.trace import TraceRequest


def requests_of(blocks: list[list[int]]) -> list[TraceRequest]:
    return [TraceRequest(0.0, 512 * len(ids), 1, tuple(ids)) for ids in blocks]


def test_the_least_recently_used_block_goes_first() -> None:
    requests = requests_of([[0, 1], [0, 2], [0, 1]])
    assert lru_hit_rate(requests, capacity_blocks=2) == 2 / 6
    assert lru_hit_rate(requests, capacity_blocks=3) == 3 / 6


def test_nothing_looked_up_is_a_hit_rate_of_zero() -> None:
    assert lru_hit_curve([], [1, None]) == {1: 0.0, None: 0.0}


def test_a_cache_of_no_blocks_never_hits() -> None:
    assert lru_hit_rate(requests_of([[1], [1]]), capacity_blocks=0) == 0.0


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), max_size=12), st.integers(0, 12))
def test_it_agrees_with_a_list_of_recent_blocks(blocks: list[list[int]], capacity: int) -> None:
    recent: list[int] = []
    hits = 0
    for block in (b for ids in blocks for b in ids):
        hits += block in recent[:capacity]
        recent = [block, *(b for b in recent if b != block)]
    expected = hits / max(1, sum(map(len, blocks)))
    assert lru_hit_rate(requests_of(blocks), capacity_blocks=capacity) == expected


class FirstCome:
    """Keeps the first blocks that it sees, for good."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.held: set[bytes] = set()

    def serve(self, keys: Sequence[bytes], now: float) -> int:
        hits = next((i for i, key in enumerate(keys) if key not in self.held), len(keys))
        self.held.update(keys[hits : hits + self.capacity - len(self.held)])
        return hits


def test_hit_rates_count_prefixes_in_blocks_and_in_seconds() -> None:
    requests = requests_of([[0, 1, 2], [0, 1, 3], [4, 1]])
    rates = hit_rates(requests, [0, 1, 9], FirstCome, seconds=lambda depth: 1.0 + depth)
    assert rates == {0: HitRate(0.0, 0.0), 1: HitRate(1 / 8, 1 / 15), 9: HitRate(2 / 8, 3 / 15)}
    assert hit_rates([], [1], FirstCome) == {1: HitRate(0.0, 0.0)}
