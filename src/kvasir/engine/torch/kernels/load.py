"""Which implementation of the operations this process runs."""

import os

import torch

from kvasir.engine.torch.kernels.cpp_ops import MAX_HEAD_DIM, CppOps
from kvasir.engine.torch.kernels.ops import Ops
from kvasir.engine.torch.kernels.torch_ops import TorchOps
from kvasir.native.cpp import NotCompiledError, build

FORCE_VARIABLE = "KVASIR_KERNELS"
PACKAGE = "kvasir.engine.torch.kernels"


def load_ops(device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> Ops:
    """The fastest operations for this device, dtype and head size; `ops.name` says which and `ops.reason` why.

    Builds the C++ kernels at the first call on a machine (some seconds), and finds them built after that; Triton compiles
    its own when they are first called.
    `KVASIR_KERNELS=torch` forces plain torch.
    """
    if os.environ.get(FORCE_VARIABLE) == "torch":
        return TorchOps(f"{FORCE_VARIABLE}=torch")
    if torch.device(device).type == "cuda":
        return _on_gpu()
    if obstacle := _obstacle(torch.device(device), dtype, head_dim):
        return TorchOps(obstacle)
    try:
        return CppOps(build(PACKAGE))
    except (NotCompiledError, OSError) as error:
        return TorchOps(str(error))


def _on_gpu() -> Ops:
    try:
        from kvasir.engine.torch.kernels.gpu.ops import TritonOps  # Triton comes with torch for CUDA, and only with it
    except ImportError as error:
        return TorchOps(f"no Triton: {error}")
    return TritonOps("Triton kernels")


def _obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the C++ kernels do not serve this model here, if so."""
    if device.type != "cpu":
        return f"the C++ kernels run on cpu, the model is on {device}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernels know float32 and bfloat16, the model is {dtype}"
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        return f"the C++ kernels want a head_dim that is a multiple of 16 up to {MAX_HEAD_DIM}, the model has {head_dim}"
    return None
