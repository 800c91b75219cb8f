"""Which arena slots a device holds a copy of, and where: a cache with least-recently-used replacement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvasir.core.errors import InvariantError, PoolError

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_NONE = -1  # in the arrays below: this slot has no page, this page holds no slot


@dataclass(frozen=True, slots=True)
class Claim:
    """The pages of the slots that a step asked for, in its order, and which of them must be loaded first."""

    pages: Ints
    is_missing: Bools


class DevicePages:
    """The bookkeeping of device pages; moves no byte.

    A copy is good when the slot has not been reserved anew since (its generation) and when the copy covers as many of the
    block's tokens as the step will read, in the layers that it computes: another instance may have filled the rest of a block
    after this one copied it, or computes its other layers. The layers of a copy follow one another, and all of them are good
    for the same tokens.
    """

    def __init__(self, *, num_slots: int, num_pages: int) -> None:
        self._page_of = np.full(num_slots, _NONE, dtype=np.int64)
        self._generation = np.zeros(num_slots, dtype=np.int64)
        self._filled = np.zeros(num_slots, dtype=np.int64)
        self._layers = np.zeros((num_slots, 2), dtype=np.int64)  # first, last + 1
        self._slot_of = np.full(num_pages, _NONE, dtype=np.int64)
        self._last_used = np.zeros(num_pages, dtype=np.int64)
        self._step = 0

    @property
    def num_pages(self) -> int:
        """How many blocks the device holds at most."""
        return len(self._slot_of)

    def claim(self, slots: Ints, *, generations: Ints, needed: Ints, layers: range) -> Claim:
        """Give every slot (each named once) a page for this step; `needed` are the tokens that must be good in these layers.

        Pages of this step are never taken from each other. Raises PoolError, and changes nothing, where there are too few.
        """
        if len(slots) > self.num_pages:
            raise PoolError(f"device KV: the step needs {len(slots)} blocks at once, the device holds {self.num_pages}")
        self._step += 1
        held = self._page_of[slots] != _NONE
        is_covered = (self._layers[slots, 0] <= layers.start) & (self._layers[slots, 1] >= layers.stop)
        is_good = held & (self._generation[slots] == generations) & (self._filled[slots] >= needed) & is_covered
        self._last_used[self._page_of[slots[held]]] = self._step
        self._give_pages(slots[~held])
        self._generation[slots] = generations
        self._filled[slots[~is_good]] = 0
        self._layers[slots[~is_good]] = layers.start, layers.stop
        return Claim(self._page_of[slots], ~is_good & (needed > 0))

    def commit(self, slots: Ints, *, filled: Ints, is_written: Bools, layers: range) -> None:
        """The step over these layers, as claimed, is over: of each slot `filled` tokens are good in them.

        Where nothing was written, what was good before still is.
        """
        self._filled[slots] = np.where(is_written, filled, np.maximum(self._filled[slots], filled))
        self._layers[slots[is_written]] = layers.start, layers.stop

    def forget(self, slots: Ints) -> None:
        """The step failed: nothing in these pages is known to be good."""
        self._filled[slots] = 0

    def check(self) -> None:
        """Raise InvariantError unless slots and pages name each other."""
        pages = np.flatnonzero(self._slot_of != _NONE)
        slots = np.flatnonzero(self._page_of != _NONE)
        if len(pages) != len(slots) or (self._page_of[self._slot_of[pages]] != pages).any():
            raise InvariantError("device pages: slots and pages do not name each other")

    def _give_pages(self, slots: Ints) -> None:
        """Pages for slots that have none: empty ones, then those used longest ago."""
        age = np.where(self._slot_of == _NONE, _NONE, self._last_used)
        pages = np.argsort(age, kind="stable")[: len(slots)]
        evicted = self._slot_of[pages]
        self._page_of[evicted[evicted != _NONE]] = _NONE
        self._page_of[slots] = pages
        self._slot_of[pages] = slots
        self._last_used[pages] = self._step
