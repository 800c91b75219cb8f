"""Where a forward pass finds its KV: the arena itself, or pages of a device that follow the arena."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from kvasir.engine.interface import SequenceSlice, Slots
from kvasir.engine.landing import Landing
from kvasir.engine.torch.kernels import KvLayout, KvView


class KvAccess(Protocol):
    """One forward pass's access to KV: `begin`, then for each layer `before_layer` .. `after_layer`, then `end`.

    A pass over a slice with a stage computes the stage's layers, any other all of them. After an exception in between, `abort`
    instead of `end`.
    """

    @property
    def view(self) -> KvView:
        """What attention reads and writes."""

    def begin(self, slices: Sequence[SequenceSlice]) -> list[Sequence[int]]:
        """The slices' block tables as slot ids of `view`. Either none of them has a stage, or there is only one."""

    def before_layer(self, layer: int) -> None:
        """Cached KV of this layer is in `view` when this returns (for kernels issued from now on)."""

    def after_layer(self, layer: int) -> None:
        """The pass's new KV of this layer has been written (by kernels issued so far)."""

    def end(self) -> None:
        """All new KV of the pass is in the arena when this returns."""

    def abort(self) -> None:
        """The pass failed: nothing that it wrote may be trusted."""

    def close(self) -> None:
        """No step comes any more: let go of the arena."""


class InPlaceKv:
    """KV in memory that attention reads and writes where it lies; nothing is moved. With a `landing` it may be yet to come."""

    def __init__(self, view: KvView, landing: Landing | None = None) -> None:
        self.view = view
        self._landing = landing

    def begin(self, slices: Sequence[SequenceSlice]) -> list[Sequence[int]]:
        if self._landing is not None:
            self._landing.begin(slices)
        return [s.pages for s in slices]

    def before_layer(self, layer: int) -> None:
        if self._landing is not None:
            self._landing.wait(layer)

    def after_layer(self, layer: int) -> None:
        pass

    def end(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def in_place_kv(slots: Slots, layout: KvLayout) -> InPlaceKv:
    """The CPU's way: the arena's slots themselves, mapped without a copy."""
    return InPlaceKv(KvView(torch.from_numpy(slots.memory), layout, slots.stride), landing_of(slots, layout))


def landing_of(slots: Slots, layout: KvLayout) -> Landing:
    """What is still on its way to these slots."""
    return Landing(slots.missing, layout.num_layers, layout.block_tokens)
