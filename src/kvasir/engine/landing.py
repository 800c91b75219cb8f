"""Computing on blocks that are still on their way: layer l of a step waits until layer l of its cached blocks has come.

`missing[i]`, in memory shared with the pool's process, is how many layers of slot i are still to come, the last ones; 0 for
every block that is complete, and LOST where they will never come. The pool writes it after the bytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvasir.core.errors import KvLost
from kvasir.engine.interface import SequenceSlice

LOST = 0xFFFFFFFF
PATIENCE_S = 30.0
"""A layer that has not come by then will not; the pool gives a transfer up before."""
LOOK_S = 2e-4

Slots = npt.NDArray[np.int64]


class Landing:
    """One step's view of what has come. `begin` before each step; then a layer is waited for with `wait`, or looked at."""

    def __init__(self, missing: npt.NDArray[np.uint32], num_layers: int, block_tokens: int):
        self._missing = missing
        self._num_layers = num_layers
        self._block_tokens = block_tokens
        self._coming: dict[str, Slots] = {}

    def begin(self, slices: Sequence[SequenceSlice]) -> None:
        self._coming = {}
        if not self._missing.any():
            return
        for s in slices:
            cached = np.asarray(s.pages[: -(-s.start // self._block_tokens)], dtype=np.int64)
            coming = cached[self._missing[cached] != 0]
            if len(coming):
                self._coming[s.request_id] = coming

    def is_here(self, layer: int) -> bool:
        """Whether all cached blocks of the step have this layer. Raises KvLost, naming the requests whose blocks never come."""
        if not self._coming:
            return True
        most_missing = self._num_layers - 1 - layer
        latest = {run: int(self._missing[slots].max()) for run, slots in self._coming.items()}
        if lost := [run for run, missing in latest.items() if missing == LOST]:
            raise KvLost(lost)
        return all(missing <= most_missing for missing in latest.values())

    def wait(self, layer: int) -> None:
        """Return when `is_here`."""
        give_up = time.monotonic() + PATIENCE_S
        while not self.is_here(layer):
            if time.monotonic() > give_up:
                raise KvLost(list(self._coming))
            time.sleep(LOOK_S)
