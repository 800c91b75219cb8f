"""A checkpoint's tensors, read shard by shard straight into the memory and dtype in which they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvasir.core.errors import ModelError
from kvasir.engine.checkpoint import weight_files


class Weights:
    """Named tensors of a checkpoint. Files are mapped, so a tensor is read when it is asked for and copied once."""

    def __init__(self, directory: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._directory = directory
        self._files = {}
        for file in weight_files(directory):
            opened = _open(file.path)
            self._files.update({tensor.name: opened for tensor in file.tensors})

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, *shape: int) -> Tensor:
        """A copy of one tensor, which must have this shape. Raises ModelError where it is missing or different."""
        return self.fuse([name], *shape)

    def find(self, name: str, *shape: int) -> Tensor | None:
        """`get`, or None where the checkpoint has no such tensor."""
        return self.get(name, *shape) if name in self else None

    def fuse(self, names: Sequence[str], *shape: int) -> Tensor:
        """Several tensors one after another along the first dimension, as one tensor of this shape."""
        fused = torch.empty(shape, dtype=self._dtype, device=self._device)
        start = 0
        for name in names:
            part = self._mapped(name)
            if part.shape[1:] != fused.shape[1:] or start + len(part) > len(fused):
                break
            fused[start : start + len(part)].copy_(part)
            start += len(part)
        if start != len(fused):
            found = {name: tuple(self._mapped(name).shape) for name in names}
            raise ModelError(f"model {self._directory}: expected {tuple(shape)} for {names[0]}, got {found}")
        return fused

    def find_fused(self, names: Sequence[str], *shape: int) -> Tensor | None:
        """`fuse`, or None where the checkpoint has none of these."""
        return self.fuse(names, *shape) if any(name in self for name in names) else None

    def _mapped(self, name: str) -> Tensor:
        if name not in self._files:
            raise ModelError(f"model {self._directory}: the weights have no tensor {name}")
        tensor: Tensor = self._files[name].get_tensor(name)  # type: ignore[no-untyped-call]  # a compiled module
        return tensor


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model {path.parent}: {path.name} cannot be read ({error}); download it again") from None
