"""The Azure LLM inference traces of 2023 and 2024 (Azure/AzurePublicDataset): when, tokens in, tokens out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

from kvasir.core.errors import TraceError
from kvasir.workload.readers.table import NO_HASH_IDS, FreshBlocks, rows
from kvasir.workload.trace import Trace, in_order

COLUMNS = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}

_EXPECTED = "a time such as 2023-11-16 18:17:03.9799600"


def read(lines: Iterable[bytes]) -> Trace:
    """The trace, its clock 0 at the first arrival. Raises TraceError naming line and field."""
    fresh = FreshBlocks()
    requests = [
        fresh.request(row.get("TIMESTAMP", _seconds, _EXPECTED), row.tokens("ContextTokens"), row.tokens("GeneratedTokens"))
        for row in rows(lines)
    ]
    if not requests:
        raise TraceError("trace is empty: got a header and no requests")
    start_s = min(r.arrival_s for r in requests)
    return in_order([replace(r, arrival_s=r.arrival_s - start_s) for r in requests], unknown=(NO_HASH_IDS,))


def _seconds(text: str) -> float | None:
    """Seconds since 1970; a time without a zone is UTC, and digits below a microsecond are cut off."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
