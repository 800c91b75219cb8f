"""Where an engine computes, and how much of that device's memory is its own: the engines of a machine share its GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kvasir.core.errors import ConfigError, ModelError
from kvasir.core.units import format_size
from kvasir.engine.torch.kernels import KvLayout

USED_SHARE = 0.85
"""Of a GPU's memory, for weights and pages; the rest is for what a step computes with."""


@dataclass(frozen=True, slots=True)
class Place:
    """A device, and how many engines share it."""

    device: torch.device
    sharers: int = 1

    def pages_that_fit(self, layout: KvLayout, *, at_most: int) -> int:
        """Blocks that this engine may keep on its GPU beside the weights that are there. Raises ModelError without room."""
        total = torch.cuda.get_device_properties(self.device).total_memory
        mine, taken = USED_SHARE * total / self.sharers, torch.cuda.memory_reserved(self.device)
        if taken + layout.slot_bytes > mine:
            shared = f", shared by {self.sharers} instances" if self.sharers > 1 else ""
            raise ModelError(
                f"{self.device} has no room for KV: {format_size(total)}{shared}, the weights take {format_size(taken)};"
                " run fewer instances on it"
            )
        return min(at_most, int(mine - taken) // layout.slot_bytes)


def place(device: Literal["cpu", "cuda"], *, number: int = 0, of: int = 1) -> Place:
    """The place of engine `number` of the `of` on this machine: its GPUs are given out in turn.

    Raises ConfigError where there is no GPU.
    """
    if device == "cpu":
        return Place(torch.device("cpu"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ConfigError(f"--device cuda: torch {torch.__version__} finds no GPU here; use --device cpu")
    index = number % count
    return Place(torch.device("cuda", index), sharers=len(range(index, max(of, number + 1), count)))
