"""The rows of a simulated run as they are written."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kvasir.report.timeline import Status
from kvasir.simulator.records import Floats, Records
from kvasir.workload.trace import Trace


class RecordBook:
    """Rows as they are written; every request must get exactly one outcome. `then` is called at the last."""

    __slots__ = (
        "_arrival",
        "_cached",
        "_end",
        "_input",
        "_output",
        "_reason",
        "_status",
        "_tbt",
        "_then",
        "_ttft",
        "num_ended",
    )

    def __init__(self, trace: Trace, then: Callable[[], None]):
        self._then = then
        count = len(trace.requests)
        self._arrival = [request.arrival_s for request in trace.requests]
        self._input = [request.input_tokens for request in trace.requests]
        self._output = [0] * count
        self._cached = [0] * count
        self._ttft = [math.nan] * count
        self._tbt = [math.nan] * count
        self._end = [math.nan] * count
        self._status: list[Status | None] = [None] * count
        self._reason: list[str | None] = [None] * count
        self.num_ended = 0

    def end(
        self,
        number: int,
        status: Status,
        now: float,
        *,
        reason: str | None = None,
        output_tokens: int = 0,
        cached_tokens: int = 0,
        ttft_s: float | None = None,
        tbt_s: float | None = None,
    ) -> None:
        assert self._status[number] is None, f"request {number} ended twice"
        assert ttft_s is None or ttft_s >= 0, f"request {number} was answered before it arrived"
        self._status[number], self._reason[number], self._end[number] = status, reason, now
        self._output[number], self._cached[number] = output_tokens, cached_tokens
        if ttft_s is not None:
            self._ttft[number] = ttft_s
        if tbt_s is not None:
            self._tbt[number] = tbt_s
        self.num_ended += 1
        if self.num_ended == len(self._status):
            self._then()

    def finish(self, unloaded_prefill_s: Floats) -> Records:
        statuses = {status: index for index, status in enumerate(Status)}
        assert self.num_ended == len(self._status), "every request has an outcome"
        return Records(
            arrival_s=np.array(self._arrival),
            input_tokens=np.array(self._input, dtype=np.int64),
            output_tokens=np.array(self._output, dtype=np.int64),
            cached_tokens=np.array(self._cached, dtype=np.int64),
            ttft_s=np.array(self._ttft),
            tbt_s=np.array(self._tbt),
            end_s=np.array(self._end),
            unloaded_prefill_s=unloaded_prefill_s,
            status=np.array([statuses[status] for status in self._status if status is not None], dtype=np.int8),
            reason=tuple(self._reason),
        )
