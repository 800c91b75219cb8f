"""The residual stream's rows in the arena as tensors of the model's device."""

from __future__ import annotations

import torch
from torch import Tensor

from kvasir.engine.interface import StreamRows
from kvasir.engine.stream import Stream


def read_rows(stream: Stream, rows: StreamRows, count: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The first `count` rows, a copy [count, hidden] on the device."""
    return torch.cat([torch.from_numpy(part).to(device) for part in stream.parts(rows, count)]).view(dtype)


def write_rows(stream: Stream, rows: StreamRows, hidden: Tensor) -> None:
    """Write [T, hidden], contiguous, to the first T rows; they are in the arena when this returns."""
    parts = list(stream.parts(rows, len(hidden)))
    values = torch.split(hidden.view(torch.uint8), [len(part) for part in parts])
    for part, value in zip(parts, values, strict=True):
        torch.from_numpy(part).copy_(value)
