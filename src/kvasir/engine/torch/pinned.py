"""An arena as a GPU sees it: its memory pinned, and read and written by the GPU's own kernels where it lies."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvasir.core.errors import ConfigError
from kvasir.core.units import format_size

_PORTABLE_AND_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


class HostMemory(Protocol):
    """Memory of the host that a device's kernels reach as `bytes`."""

    bytes: Tensor

    def close(self) -> None:
        """`bytes` must not be used from now on. May be called again."""


class PlainMemory:
    """For a device that is the CPU: nothing to do."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self.bytes = torch.from_numpy(memory)

    def close(self) -> None:
        pass


class PinnedMemory:
    """Pages that the kernel may not move, in the GPU's address space; other processes may pin the same ones.

    Raises ConfigError where the driver refuses.
    """

    def __init__(self, memory: npt.NDArray[np.uint8], device: torch.device) -> None:
        self._memory = memory
        self._address = memory.ctypes.data
        with torch.cuda.device(device):
            torch.cuda.init()  # type: ignore[no-untyped-call]  # torch's annotations
            status = _cudart().cudaHostRegister(self._address, memory.nbytes, _PORTABLE_AND_MAPPED)
            if int(status):
                size = format_size(memory.nbytes)
                raise ConfigError(f"the GPU's driver cannot pin an arena of {size} (CUDA error {int(status)}): lower --dram")
            self._is_pinned = True
            self.bytes = torch.as_tensor(self, device=device)
        if self.bytes.data_ptr() != self._address:
            raise ConfigError("this GPU does not reach pinned memory under the host's address")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """How torch takes foreign memory for a tensor of a device."""
        return {"shape": self._memory.shape, "typestr": "|u1", "data": (self._address, False), "strides": None, "version": 3}

    def close(self) -> None:
        if self._is_pinned:
            self._is_pinned = False
            torch.cuda.synchronize(self.bytes.device)
            _cudart().cudaHostUnregister(self._address)


def host_memory(memory: npt.NDArray[np.uint8], device: torch.device) -> HostMemory:
    """Memory of the host for kernels of this device."""
    return PinnedMemory(memory, device) if device.type == "cuda" else PlainMemory(memory)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's annotations
