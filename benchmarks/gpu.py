"""What the engine reaches on a GPU: copies between the arena and its memory, TTFT by where the prefix is, seconds of steps.

    python -m kvasir.engine.random_model /dev/shm/8b --size 8b --device cuda
    python -m benchmarks.gpu --model /dev/shm/8b [--hardware h200] [--json]

Copies stand beside one contiguous copy of pinned memory, the machine's limit. Steps stand beside the roofline that the
simulator predicts with, one device of `--hardware`. Medians of --repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from msgspec.structs import replace

from kvasir.core.request import Sampling
from kvasir.costs.hardware import HARDWARE
from kvasir.costs.roofline import RooflineCost
from kvasir.engine.checkpoint import read_spec
from kvasir.engine.interface import SequenceSlice, Slots
from kvasir.engine.torch.engine import TorchEngine
from kvasir.engine.torch.pinned import PinnedMemory
from kvasir.store.arena import create_arena

GREEDY = Sampling(temperature=0.0)
PREFIXES = (8_192, 32_768)
NEW = 64
PREFILLS = ((512, 0), (2_048, 0), (8_192, 0), (512, 8_192), (512, 32_768))
DECODES = ((1, 1_024), (16, 1_024), (64, 1_024), (16, 8_192), (4, 32_768))
COPY_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """`value` beside `against`, and what their ratio means."""

    what: str
    unit: str
    value: float
    against: float
    ratio: float


class Bench:
    """An engine over an arena that holds all that is measured."""

    def __init__(self, model: Path, block_tokens: int, repeats: int) -> None:
        self.spec = read_spec(model, block_tokens=block_tokens)
        self.engine = TorchEngine(self.spec, device="cuda")
        tokens = max(*(b * (c + block_tokens) for b, c in DECODES), max(PREFIXES) + max(n + c for n, c in PREFILLS))
        self.arena = create_arena(-(-tokens // block_tokens) + 1, self.spec.slot_bytes)
        self.arena.memory[:] = 1
        self.slots = Slots(self.arena.memory, self.arena.stride, self.arena.generations, self.arena.missing)
        self.engine.attach(self.slots)
        self._order = np.random.default_rng(0).permutation(self.arena.num_slots).tolist()
        self._repeats = repeats

    def pages(self, index: int, tokens: int) -> list[int]:
        count = -(-tokens // self.spec.block_tokens)
        pages: list[int] = self._order[index * count : (index + 1) * count]
        return pages

    def seconds(self, slices: list[SequenceSlice], *, before: Callable[[], object] = lambda: None) -> float:
        """Median of the steps after one that warms up; `before` is done ahead of each, untimed."""
        found = []
        for _ in range(self._repeats + 1):
            before()
            torch.cuda.synchronize()
            began = perf_counter()
            self.engine.step_now(slices)
            found.append(perf_counter() - began)
        return median(found[1:])

    def prefill(self, new: int, cached: int) -> list[SequenceSlice]:
        tokens = np.random.default_rng(new).integers(4, self.spec.shape.vocab, new).astype(np.uint32)
        return [SequenceSlice("a", tokens, cached, self.pages(0, new + cached), GREEDY)]

    def decode(self, batch: int, context: int) -> list[SequenceSlice]:
        return [SequenceSlice(str(i), [7], context - 1, self.pages(i, context), GREEDY) for i in range(batch)]

    def evict(self) -> None:
        """What the GPU holds of the arena is stale from now on."""
        self.slots.generations[:] += 1


def ttfts(bench: Bench) -> Iterator[Row]:
    """A prompt whose prefix is on the GPU, or in the arena only, beside computing all of it in steps of 8,192."""
    for prefix in PREFIXES:
        cold = 0.0
        for start in range(0, prefix + NEW, 8_192):
            new = min(8_192, prefix + NEW - start)
            cold += bench.seconds(bench.prefill(new, start))
        slices = bench.prefill(NEW, prefix)
        from_dram, on_gpu = bench.seconds(slices, before=bench.evict), bench.seconds(slices)
        yield Row(f"{prefix} tokens on the GPU, {NEW} new: TTFT over cold", "s", on_gpu, cold, on_gpu / cold)
        yield Row(f"{prefix} tokens in DRAM, {NEW} new: TTFT over cold", "s", from_dram, cold, from_dram / cold)


def steps(bench: Bench, costs: RooflineCost) -> Iterator[Row]:
    """Measured seconds beside predicted ones."""
    for new, cached in PREFILLS:
        took, predicted = bench.seconds(bench.prefill(new, cached)), costs.prefill_s(new, cached)
        yield Row(f"prefill {new} on {cached}: measured over roofline", "s", took, predicted, took / predicted)
    for batch, context in DECODES:
        took, predicted = bench.seconds(bench.decode(batch, context)), costs.decode_step_s(batch, batch * context)
        yield Row(f"decode {batch} x {context}: measured over roofline", "s", took, predicted, took / predicted)


def copies(layer_bytes: int, repeats: int) -> Iterator[Row]:
    """Layers of scattered blocks, by kernels in pinned memory, beside one contiguous copy."""
    rows = COPY_BYTES // layer_bytes
    memory = np.ones(rows * layer_bytes, np.uint8)
    pinned = PinnedMemory(memory, torch.device("cuda", 0))
    host, device = pinned.bytes.view(torch.int64).view(rows, -1), torch.empty(rows, layer_bytes // 8, dtype=torch.int64).cuda()
    plain = torch.empty(rows, layer_bytes // 8, dtype=torch.int64, pin_memory=True)
    order = torch.randperm(rows).cuda()
    half = order[: rows // 2]
    for name, scattered, contiguous in (
        (
            "to the GPU",
            lambda: device.index_copy_(0, half, host.index_select(0, half)),
            lambda: device.copy_(plain, non_blocking=True),
        ),
        (
            "to the arena",
            lambda: host.index_copy_(0, half, device.index_select(0, half)),
            lambda: plain.copy_(device, non_blocking=True),
        ),
    ):
        ours, limit = _gb_s(scattered, memory.nbytes // 2, repeats), _gb_s(contiguous, memory.nbytes, repeats)
        yield Row(f"scattered blocks {name} over one copy", "GB/s", ours, limit, ours / limit)
    pinned.close()


def _gb_s(work: Callable[[], object], num_bytes: int, repeats: int) -> float:
    found = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(perf_counter() - began)
    return num_bytes / median(found[1:]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint directory")
    parser.add_argument("--hardware", choices=list(HARDWARE), default="h200")
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="machine-readable on stdout")
    args = parser.parse_args()
    bench = Bench(args.model, args.block_tokens, args.repeats)
    costs = RooflineCost(bench.spec.shape, replace(HARDWARE[args.hardware], devices=1))
    layer_bytes = bench.spec.slot_bytes // bench.spec.shape.num_layers
    rows = [*copies(layer_bytes, args.repeats), *ttfts(bench), *steps(bench, costs)]
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}"
    if args.json:
        print(json.dumps({"machine": machine, "date": str(date.today()), "rows": [asdict(row) for row in rows]}, indent=2))
        return
    print(machine, bench.engine.kernels, sep="\n")
    for row in rows:
        print(f"{row.what:60} {row.value:10.4f} {row.against:10.4f} {row.unit:5} {row.ratio:6.2f}")


if __name__ == "__main__":
    main()
