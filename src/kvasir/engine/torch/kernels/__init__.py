"""Kernels in C++ for CPUs and in Triton for GPUs, with torch fallbacks of the same meaning."""

from kvasir.engine.torch.kernels.batch import BatchLayout as BatchLayout
from kvasir.engine.torch.kernels.layout import KvLayout as KvLayout
from kvasir.engine.torch.kernels.layout import KvView as KvView
from kvasir.engine.torch.kernels.load import load_ops as load_ops
from kvasir.engine.torch.kernels.ops import Ops as Ops
from kvasir.engine.torch.kernels.ops import PackedWeight as PackedWeight
from kvasir.engine.torch.kernels.ops import TokenCopies as TokenCopies
from kvasir.engine.torch.kernels.torch_ops import TorchOps as TorchOps
