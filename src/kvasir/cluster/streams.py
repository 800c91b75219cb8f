"""Prefills whose hand-off goes to another node: their blocks follow while they run, so that little is left at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvasir.core.keys import BlockKey


@dataclass(slots=True)
class _Stream:
    """The first `available` of `keys` can be read at `source`."""

    source: str
    target: str
    keys: tuple[BlockKey, ...]
    available: int
    tenant: str


@dataclass(frozen=True, slots=True)
class Followers:
    """A prefix that `target` should have, too."""

    target: str
    keys: tuple[BlockKey, ...]
    tenant: str


class HandOffStreams:
    """Told of prefills and of nodes that stored blocks, it says which prefix can follow: of full blocks, which have keys."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}

    def begin(self, request_id: str, source: str, target: str, keys: tuple[BlockKey, ...], *, cached: int, tenant: str) -> None:
        """The prefill of these blocks begins at `source`, which has the first `cached`; another stream of the request ends."""
        self._streams[request_id] = _Stream(source, target, keys, cached, tenant)

    def end(self, request_id: str) -> None:
        """The prefill is over, however it ended. May be called again."""
        self._streams.pop(request_id, None)

    def stored(self, node: str, holds: Callable[[BlockKey], bool]) -> Iterator[Followers]:
        """Blocks came into DRAM of the node, which `holds` these now."""
        for stream in self._streams.values():
            if stream.source != node:
                continue
            before = stream.available
            while stream.available < len(stream.keys) and holds(stream.keys[stream.available]):
                stream.available += 1
            if stream.available > before:
                yield Followers(stream.target, stream.keys[: stream.available], stream.tenant)
