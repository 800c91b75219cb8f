"""One simulation that a question asks for, and what it is told of it."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from kvasir.report.slo import CAPACITY_SHARE


class Layout(StrEnum):
    """Who prefills and who decodes. `fixed` splits are under the scheduler of `elastic`, only that roles stay."""

    ELASTIC = "elastic"
    FIXED = "fixed"
    COLOCATED = "colocated"
    CHUNKED = "colocated-chunked"


class Event(StrEnum):
    """What goes wrong half-way. `node-dies`: one node, for good. `surge`: the arrivals of the trace's middle fifth come twice
    as fast."""

    NONE = "none"
    NODE_DIES = "node-dies"
    SURGE = "surge"


class Part(StrEnum):
    """Of the trace: all of it, or its quietest stretch."""

    WHOLE = "whole"
    QUIET = "quiet"


class RunSpec(Struct, frozen=True):
    """`load` is in multiples of the target load; DRAM and SSD are of each node. `num_prefill` is of a fixed split, else 0."""

    nodes: int
    dram_bytes: int
    ssd_bytes: int = 0
    load: float = 1.0
    layout: Layout = Layout.ELASTIC
    num_prefill: int = 0
    event: Event = Event.NONE
    part: Part = Part.WHOLE

    @property
    def split(self) -> str:
        """Roles at the start, in the notation of `with_split`.

        Elastic ones begin with one instance that decodes: more are opened at once, but closed only after a while, which would
        count on a short trace.
        """
        if self.layout is Layout.FIXED:
            return f"{self.num_prefill}P{self.nodes - self.num_prefill}D"
        others = self.nodes - 1
        return f"{others}P1M" if others and self.layout is Layout.ELASTIC else "elastic"

    @property
    def name(self) -> str:
        """What a table calls its layout."""
        return self.split if self.layout is Layout.FIXED else self.layout.value


class Figures(Struct, frozen=True):
    """What a run gave. Shares are of requests and of input tokens that were offered.

    `effective_over_time` are shares of the requests by arrival, in parts of `bin_s` each; None where none arrived. `event_s` is
    when the node died or the surge ended, on the same clock.
    """

    requests: int
    effective_requests: float
    effective_input_tokens: float
    rejected: int
    failed: int
    hit_rate: float
    prefill_s_per_request: float
    ttft_p90_s: float | None
    tbt_p90_s: float | None
    event_s: float = 0.0
    bin_s: float = 0.0
    effective_over_time: tuple[float | None, ...] = ()

    @property
    def effective(self) -> float:
        """The smaller of both shares: what a capacity is judged by."""
        return min(self.effective_requests, self.effective_input_tokens)

    @property
    def passes(self) -> bool:
        """Whether the load is served."""
        return self.effective >= CAPACITY_SHARE
