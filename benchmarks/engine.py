"""The embedded engine in process against transformers with sdpa, interleaved: seconds of prefill, tokens/s of decode.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.engine --model DIR [--json]

Without --model a random checkpoint of --size is made first. Medians, and the spread as (max - min) / median.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from kvasir.core.request import Sampling
from kvasir.engine.checkpoint import read_spec
from kvasir.engine.interface import SequenceSlice, Slots
from kvasir.engine.random_model import SIZES, make_checkpoint
from kvasir.engine.torch.engine import TorchEngine

GREEDY = Sampling(temperature=0.0)
PREFILLS = (512, 2048, 8192)
BATCHES = (1, 8, 32)
CONTEXT = 512
DECODE_STEPS = 24


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: medians of both, in `unit`, and their spreads."""

    what: str
    unit: str
    ours: float
    ours_spread: float
    theirs: float | None
    theirs_spread: float | None


class Ours:
    """Kvasir's engine over an arena of its own."""

    def __init__(self, path: Path, *, device: Literal["cpu", "cuda"], block_tokens: int, chunk: int) -> None:
        self.spec = read_spec(path, block_tokens=block_tokens)
        self.engine = TorchEngine(self.spec, device=device)
        self._chunk = chunk
        tokens = max(max(PREFILLS), max(BATCHES) * (CONTEXT + 2 * DECODE_STEPS + block_tokens))
        num_slots = -(-tokens // block_tokens)
        memory = np.ones(num_slots * self.spec.slot_bytes, np.uint8)  # touched: fresh pages are not what is measured
        counts = np.zeros((2, num_slots), np.uint32)
        self.engine.attach(Slots(memory, self.spec.slot_bytes, counts[0], counts[1]))
        self._order: list[int] = np.random.default_rng(0).permutation(num_slots).tolist()

    def prefill(self, length: int) -> float:
        tokens, pages = _tokens(self.spec.shape.vocab, length), self._pages(0, length)
        started = perf_counter()
        for start in range(0, length, self._chunk):
            part = tokens[start : start + self._chunk]
            self._step([SequenceSlice("a", part, start, pages, GREEDY if start + self._chunk >= length else None)])
        return perf_counter() - started

    def decode(self, batch: int) -> float:
        """Tokens a second at the batch size, each sequence CONTEXT tokens long at first."""
        length = CONTEXT + DECODE_STEPS + 1
        pages = [self._pages(i, length) for i in range(batch)]
        for i in range(batch):
            self._step([SequenceSlice(str(i), _tokens(self.spec.shape.vocab, CONTEXT), 0, pages[i], None)])
        started = perf_counter()
        for position in range(CONTEXT, CONTEXT + DECODE_STEPS):
            self._step([SequenceSlice(str(i), [7], position, pages[i], GREEDY) for i in range(batch)])
        return batch * DECODE_STEPS / (perf_counter() - started)

    def _step(self, slices: Sequence[SequenceSlice]) -> None:
        self.engine.step_now(slices)

    def _pages(self, index: int, length: int) -> list[int]:
        count = -(-length // self.spec.block_tokens)
        return self._order[index * count : (index + 1) * count]


class Theirs:
    """transformers with sdpa, its own cache, a static batch."""

    def __init__(self, path: Path, device: str) -> None:
        self._device = device
        self._model: Any = (
            AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="sdpa").to(device).eval()
        )
        self._vocab = int(self._model.config.vocab_size)

    @torch.inference_mode()
    def prefill(self, length: int) -> float:
        ids = torch.tensor([_tokens(self._vocab, length)], device=self._device)
        started = perf_counter()
        self._model(ids, past_key_values=DynamicCache(), logits_to_keep=1).logits.argmax(-1).tolist()
        return perf_counter() - started

    @torch.inference_mode()
    def decode(self, batch: int) -> float:
        cache = DynamicCache()
        ids = torch.tensor([_tokens(self._vocab, CONTEXT)] * batch, device=self._device)
        self._model(ids, past_key_values=cache, logits_to_keep=1)
        started = perf_counter()
        for _ in range(DECODE_STEPS):
            self._model(torch.full((batch, 1), 7, device=self._device), past_key_values=cache).logits.argmax(-1).tolist()
        return batch * DECODE_STEPS / (perf_counter() - started)


def _tokens(vocab: int, length: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(length).integers(4, vocab, length).tolist()
    return tokens


def measure(ours: Ours, theirs: Theirs | None, *, repeats: int, longest: int) -> list[Row]:
    """All rows, ours and theirs in turn after one warm-up each."""
    rows = []
    for length in (n for n in PREFILLS if n <= longest):
        run = (lambda n=length: ours.prefill(n)), (lambda n=length: theirs.prefill(n)) if theirs else None
        rows.append(_row(f"prefill {length}", "s", *run, repeats=repeats))
    for batch in BATCHES:
        run = (lambda n=batch: ours.decode(n)), (lambda n=batch: theirs.decode(n)) if theirs else None
        rows.append(_row(f"decode batch {batch}, context {CONTEXT}", "tok/s", *run, repeats=repeats))
    return rows


def _row(what: str, unit: str, ours: Callable[[], float], theirs: Callable[[], float] | None, *, repeats: int) -> Row:
    ours()
    mine, other = [], []
    if theirs is not None:
        theirs()
    for _ in range(repeats):
        mine.append(ours())
        if theirs is not None:
            other.append(theirs())
    return Row(what, unit, *_summary(mine), *(_summary(other) if other else (None, None)))


def _summary(values: list[float]) -> tuple[float, float]:
    middle = median(values)
    return middle, (max(values) - min(values)) / middle


def _print_table(rows: list[Row]) -> None:
    print(f"{'':34} {'kvasir':>18} {'transformers':>18}")
    for row in rows:
        cells = [f"{row.ours:.4g} {row.unit} ±{row.ours_spread / 2:.0%}"]
        if row.theirs is not None and row.theirs_spread is not None:
            cells.append(f"{row.theirs:.4g} {row.unit} ±{row.theirs_spread / 2:.0%}")
        print(f"{row.what:34} " + " ".join(f"{cell:>18}" for cell in cells))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint directory; without it a random one of --size")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prefill chunk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--longest", type=int, default=max(PREFILLS), help="longest prefill to measure")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = args.model or make_checkpoint(scratch, size=args.size, dtype="bfloat16")
        ours = Ours(path, device=args.device, block_tokens=args.block_tokens, chunk=args.chunk)
        theirs = None if args.ours_only else Theirs(path, args.device)
        rows = measure(ours, theirs, repeats=args.repeats, longest=args.longest)
    conditions = {
        "model": str(args.model or args.size),
        "kernels": ours.engine.kernels,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "block_tokens": args.block_tokens,
        "chunk": args.chunk,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if args.device == "cuda" else ""),
        "torch": torch.__version__,
    }
    if args.json:
        json.dump({"conditions": conditions, "rows": [asdict(row) for row in rows]}, sys.stdout, indent=1)
        return
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    _print_table(rows)


if __name__ == "__main__":
    main()
