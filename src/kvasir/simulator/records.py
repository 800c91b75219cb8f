"""One row per request of a simulated run, as columns: what report/timeline.py keeps per request of a live one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvasir.report.timeline import Status

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Records:
    """Columns in the order of the trace. Seconds that were not measured are NaN; `statuses[status[i]]` is how i ended.

    `tbt_s` is NaN for one token, too. `cached_tokens` were in place when the first prefill began; `end_s` is on the clock of
    `arrival_s`. `unloaded_prefill_s` is the predicted prefill of the whole prompt on an idle, empty instance.
    """

    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    cached_tokens: Ints
    ttft_s: Floats
    tbt_s: Floats
    end_s: Floats
    unloaded_prefill_s: Floats
    status: npt.NDArray[np.int8]
    reason: tuple[str | None, ...]
    statuses: tuple[Status, ...] = tuple(Status)

    def is_(self, status: Status) -> npt.NDArray[np.bool_]:
        matches: npt.NDArray[np.bool_] = self.status == self.statuses.index(status)
        return matches
