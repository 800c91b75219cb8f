"""Block hit rate of one shared LRU cache over a sequence of requests: the yardstick for traces and their imitations."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

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


def _unlimited_hit_rate(requests: Iterable[TraceRequest]) -> float:
    seen: set[int] = set()
    lookups = 0
    for request in requests:
        lookups += len(request.hash_ids)
        seen.update(request.hash_ids)
    return (lookups - len(seen)) / lookups if lookups else 0.0
