"""Block hit rate of one shared cache over a sequence of requests: the yardstick for traces and for eviction policies."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from kvasir.workload.trace import TraceRequest


def lru_hit_rate(requests: Iterable[TraceRequest], *, capacity_blocks: int | None = None) -> float:
    """Share of block look-ups that hit an LRU cache of `capacity_blocks` (None: unlimited) shared by all requests.

    Requests come one after another; each looks up and inserts its blocks in order. A hit is counted block by block, so
    a suffix block may hit although its prefix was evicted, as in the Mooncake paper's Table 2. No requests: 0.0.
    """
    if capacity_blocks is None:
        return _unlimited_hit_rate(requests)
    cache: OrderedDict[int, None] = OrderedDict()
    lookups = hits = 0
    for request in requests:
        lookups += len(request.hash_ids)
        for block in request.hash_ids:
            if block in cache:
                hits += 1
                cache.move_to_end(block)
                continue
            cache[block] = None
            if len(cache) > capacity_blocks:
                cache.popitem(last=False)
    return hits / lookups if lookups else 0.0


def lru_hit_curve(requests: Sequence[TraceRequest], capacities: Iterable[int | None]) -> dict[int | None, float]:
    """`lru_hit_rate` at each capacity, in blocks; None is unlimited."""
    return {capacity: lru_hit_rate(requests, capacity_blocks=capacity) for capacity in capacities}


@dataclass(frozen=True, slots=True)
class HitRate:
    """Shares of look-ups that hit: of blocks, and of the seconds that computing each looked-up block takes."""

    blocks: float
    seconds: float


class PrefixCache(Protocol):
    """What can be replayed against: a cache that serves prefixes and evicts by itself."""

    def serve(self, keys: Sequence[bytes], now: float) -> int:
        """Use the blocks of one request, all at once, in order; the number of leading blocks that were there before."""
        ...


def hit_rates(
    requests: Sequence[TraceRequest],
    capacities: Iterable[int],
    make_cache: Callable[[int], PrefixCache],
    *,
    seconds: Callable[[int], float] = lambda _: 1.0,
) -> dict[int, HitRate]:
    """Hit rates of the cache that `make_cache` gives at each capacity in blocks; `seconds` of a block are by its depth.

    Only prefixes hit, as in a pool, unlike in `lru_hit_rate`. No requests: 0.0.
    """
    keyed = [(r.arrival_s, tuple(block.to_bytes(16, "little") for block in r.hash_ids)) for r in requests]
    upto = list(accumulate(map(seconds, range(max((len(keys) for _, keys in keyed), default=0))), initial=0.0))
    lookups = sum(len(keys) for _, keys in keyed)
    all_s = sum(upto[len(keys)] for _, keys in keyed)
    rates = {}
    for capacity in capacities:
        serve = make_cache(capacity).serve
        hits = [serve(keys, now) for now, keys in keyed]
        rates[capacity] = HitRate(sum(hits) / lookups, sum(upto[h] for h in hits) / all_s) if lookups else HitRate(0.0, 0.0)
    return rates


def _unlimited_hit_rate(requests: Iterable[TraceRequest]) -> float:
    seen: set[int] = set()
    lookups = 0
    for request in requests:
        lookups += len(request.hash_ids)
        seen.update(request.hash_ids)
    return (lookups - len(seen)) / lookups if lookups else 0.0
