"""BurstGPT (HPMLL/BurstGPT): seconds since the collection began, tokens in, tokens out; failures have no response."""

from __future__ import annotations

from collections.abc import Iterable

from kvasir.core.errors import TraceError
from kvasir.workload.readers.table import NO_HASH_IDS, FreshBlocks, number_of, rows
from kvasir.workload.trace import Trace, TraceRequest, in_order

COLUMNS = {"Timestamp", "Request tokens", "Response tokens"}


def read(lines: Iterable[bytes]) -> Trace:
    """The trace; rows with 0 response tokens are failures, dropped and counted. Raises TraceError naming line and field."""
    fresh = FreshBlocks()
    requests: list[TraceRequest] = []
    num_dropped = 0
    for row in rows(lines):
        arrival_s = row.get("Timestamp", _seconds, "seconds >= 0")
        output_tokens = row.tokens("Response tokens", least=0)
        if output_tokens == 0:
            num_dropped += 1
            continue
        requests.append(fresh.request(arrival_s, row.tokens("Request tokens"), output_tokens))
    if not requests:
        raise TraceError(f"trace is empty: got {num_dropped} failures and no request with a response")
    return in_order(requests, num_dropped=num_dropped, unknown=(NO_HASH_IDS,))


def _seconds(text: str) -> float | None:
    value = number_of(text)
    return value if value is not None and value >= 0 else None
