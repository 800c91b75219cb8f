"""Eviction policies on request sequences: the pool's replay against the plain cache model, and on the published trace."""

from hypothesis import given
from hypothesis import strategies as st

from kvasir.costs.roofline import reference_cost
from kvasir.pool.cost_aware import block_seconds
from kvasir.pool.eviction import Lru
from kvasir.pool.policies import EVICTIONS
from kvasir.pool.replay import CacheReplay
from kvasir.workload.cache_model import HitRate, hit_rates, lru_hit_rate
from kvasir.workload.trace import Trace, TraceRequest

SECONDS = block_seconds(reference_cost(), 512)


def replay(requests: list[TraceRequest] | tuple[TraceRequest, ...], policy: str, capacity: int) -> HitRate:
    rates = hit_rates(requests, [capacity], lambda n: CacheReplay(n, EVICTIONS[policy](SECONDS)), seconds=SECONDS)
    return rates[capacity]


def ids_of(path: list[int]) -> tuple[int, ...]:
    """One for each block and all that is before it: its digits spell out the path."""
    return tuple(int("9" + "".join(map(str, path[: depth + 1]))) for depth in range(len(path)))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=12))
def test_with_room_for_all_every_policy_hits_what_was_seen(paths: list[list[int]]) -> None:
    ids = [
        [sum(3**i * (step + 1) for i, step in enumerate(path[: d + 1])) + 7**6 * d for d in range(len(path))] for path in paths
    ]
    requests = [TraceRequest(float(n), 512 * len(blocks), 1, tuple(blocks)) for n, blocks in enumerate(ids)]
    expected = lru_hit_rate(requests)
    assert all(replay(requests, policy, 100).blocks == expected for policy in EVICTIONS)


def test_a_cache_serves_as_much_of_a_request_as_it_has_room_for() -> None:
    cache = CacheReplay(2, Lru())
    keys = [bytes([i]) * 16 for i in range(3)]
    assert [cache.serve(keys, 0.0) for _ in range(2)] == [0, 2]


def test_cost_aware_saves_more_seconds_than_lru_where_the_pool_is_too_small(real_trace: Trace) -> None:
    """By 7 % on the whole trace at 10,000 blocks."""
    lru, aware = (replay(real_trace.requests, policy, 10_000) for policy in ("lru", "cost-aware"))
    assert aware.seconds > 1.03 * lru.seconds
