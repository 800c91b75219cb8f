"""Published figures of the machines that models run on. Peaks are dense bf16, without sparsity."""

from __future__ import annotations

from functools import cached_property

from msgspec import Struct

from kvasir.core.errors import ConfigError

TERA = 1e12
GIGA = 1e9


class Hardware(Struct, frozen=True, dict=True):
    """One node: `devices` accelerators with `flops` (FLOP/s) and `memory_bandwidth` (bytes/s) each.

    `flops_efficiency` and `memory_efficiency` are the shares of these peaks that a good engine reaches. `network_bandwidth`
    (bytes/s) and `network_latency_s` are the node's, to another node. `prefill_overhead_s` and `step_overhead_s` are paid
    once per prefill and per decode step, for launching, sampling and synchronising. `source` says where the peaks are from.

    `dram_bytes` is the node's main memory and `ssd_*` one NVMe drive in it; 0 is not known, and then has to be said.
    """

    name: str
    devices: int
    flops: float
    memory_bandwidth: float
    memory_bytes: int
    network_bandwidth: float
    source: str
    flops_efficiency: float = 0.5
    memory_efficiency: float = 0.75
    network_latency_s: float = 20e-6
    prefill_overhead_s: float = 10e-3
    step_overhead_s: float = 8e-3
    dram_bytes: int = 0
    ssd_bytes: int = 0
    ssd_read_bandwidth: float = 0.0
    ssd_write_bandwidth: float = 0.0

    @cached_property
    def effective_flops(self) -> float:
        return self.devices * self.flops * self.flops_efficiency

    @cached_property
    def effective_memory_bandwidth(self) -> float:
        return self.devices * self.memory_bandwidth * self.memory_efficiency


_DGX_DRAM = 2 * 10**12
"""NVIDIA DGX A100 80GB, DGX H100 and DGX H200 data sheets: 2 TB of system memory each."""

_NVME_BYTES, _NVME_READ, _NVME_WRITE = 3_200 * 10**9, 6.8e9, 5.3e9
"""One 3.2 TB PCIe 4 drive for mixed use: Micron 7450 MAX, sequential reads 6,800 MB/s and writes 5,300 MB/s by its brief."""

HARDWARE: dict[str, Hardware] = {
    "a800": Hardware(
        name="a800",
        devices=8,
        flops=312 * TERA,
        memory_bandwidth=2.039e12,
        memory_bytes=80 * 10**9,
        network_bandwidth=80 * GIGA,
        source="NVIDIA A100 80GB SXM data sheet (the A800 differs in NVLink only); network: 4 x 200 Gbit/s of the Mooncake"
        " test bed, of which its transfer engine reaches 87 GB/s (FAST'25)",
        dram_bytes=_DGX_DRAM,
        ssd_bytes=_NVME_BYTES,
        ssd_read_bandwidth=_NVME_READ,
        ssd_write_bandwidth=_NVME_WRITE,
    ),
    "h800": Hardware(
        name="h800",
        devices=8,
        flops=989.4 * TERA,
        memory_bandwidth=3.35e12,
        memory_bytes=80 * 10**9,
        network_bandwidth=180 * GIGA,
        source="NVIDIA H100 SXM data sheet (the H800 differs in NVLink and float64); network: 8 x 400 Gbit/s, of which the"
        " Mooncake transfer engine reaches 190 GB/s (FAST'25)",
        dram_bytes=_DGX_DRAM,
        ssd_bytes=_NVME_BYTES,
        ssd_read_bandwidth=_NVME_READ,
        ssd_write_bandwidth=_NVME_WRITE,
    ),
    "h200": Hardware(
        name="h200",
        devices=8,
        flops=989.4 * TERA,
        memory_bandwidth=4.8e12,
        memory_bytes=141 * 10**9,
        network_bandwidth=180 * GIGA,
        source="NVIDIA H200 SXM data sheet; network as for h800",
        dram_bytes=_DGX_DRAM,
        ssd_bytes=_NVME_BYTES,
        ssd_read_bandwidth=_NVME_READ,
        ssd_write_bandwidth=_NVME_WRITE,
    ),
    "cpu-laptop": Hardware(
        name="cpu-laptop",
        devices=1,
        flops=0.93 * TERA,
        memory_bandwidth=30 * GIGA,
        memory_bytes=16 * 2**30,
        network_bandwidth=4 * GIGA,
        source="measured on 2 cores of an AMD EPYC with AVX-512 bf16: matrix products of 512 rows and more in bf16 930 GFLOP/s,"
        " weights streamed from memory 20-39 GB/s, TCP loopback 3.9-4.5 GB/s",
        flops_efficiency=0.7,
        memory_efficiency=0.8,
        network_latency_s=60e-6,
        prefill_overhead_s=2e-3,
        step_overhead_s=2e-3,
        dram_bytes=16 * 2**30,
    ),
}
"""Name → node. A different node is a `Hardware` of one's own, or `msgspec.structs.replace` of one of these."""


def hardware(name: str) -> Hardware:
    """Raises ConfigError for a name that is not in the table."""
    if name not in HARDWARE:
        raise ConfigError(f"unknown hardware {name!r}; known are {', '.join(HARDWARE)}")
    return HARDWARE[name]
