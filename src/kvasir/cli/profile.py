"""`kvasir profile`: measure the engine on this machine and fit the cost model that the conductor predicts with."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvasir.cli.costs import profile_path
from kvasir.cluster.config import BUILTIN_MODEL, ServeConfig, load_config
from kvasir.cluster.model import model_spec
from kvasir.core.errors import ConfigError
from kvasir.core.units import format_duration, parse_duration
from kvasir.costs.fitted import DecodeSample, FittedCost, PrefillSample, fit_decode, fit_prefill
from kvasir.engine.interface import Engine, SequenceSlice, Slots
from kvasir.engine.trial import decode_step, prefill_step

PREFILL_NEW = (64, 256, 512, 1024, 2048, 4096)
PREFILL_CACHED = (0, 1024, 4096, 8192)
DECODE_BATCH = (1, 4, 8, 16, 32)
DECODE_CONTEXT = (128, 1024, 4096)
REPEATS = 3
COPY_BYTES = 256 << 20


def profile(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or name.")] = BUILTIN_MODEL,
    out: Annotated[Path | None, typer.Option(help="Where to write it (default: where `kvasir serve` looks).")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    block_tokens: Annotated[int, typer.Option(help="Tokens in a block.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine (default: all cores).")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    budget: Annotated[str, typer.Option(help="Stop measuring larger sizes after this long.")] = "90s",
) -> None:
    """Measure prefill and decode of a model on this machine, fit predicted seconds, and keep them for `kvasir serve`.

        kvasir profile ./Qwen3-0.6B

    Run it while nothing else runs. Without a profile `kvasir serve` starts from a roofline of a typical device; with either,
    its predictions follow what its steps take.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads or os.cpu_count() or 1)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    flags = {"model": model, "dtype": dtype, "block_tokens": block_tokens, "threads": threads, "device": device}
    asyncio.run(_profile(load_config(None, flags), out, budget_s=parse_duration(budget)))


async def _profile(config: ServeConfig, out: Path | None, *, budget_s: float) -> None:
    from kvasir.engine.torch.engine import TorchEngine

    console = Console(stderr=True, highlight=False)
    spec = model_spec(config)
    engine = await TorchEngine.load(spec, device=config.device)
    engine.attach(_private_slots(engine))
    try:
        prefills, decodes = await _measure(engine, console, budget_s)
    finally:
        await engine.close()
    fitted = FittedCost(
        fit_prefill(prefills), fit_decode(decodes), transfer_latency_s=1e-4, transfer_bandwidth=_copy_bandwidth()
    )
    path = out or profile_path(spec, config.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(fitted.to_json())
    _show(console, prefills, decodes, fitted)
    console.print(f"written to {path}", soft_wrap=True)


async def _measure(engine: Engine, console: Console, budget_s: float) -> tuple[list[PrefillSample], list[DecodeSample]]:
    """Smallest sizes first, so that a slow model still gives enough of them within the budget."""
    deadline = time.monotonic() + budget_s
    pages = range(_num_pages(engine))
    prefills: list[PrefillSample] = []
    decodes: list[DecodeSample] = []
    await _seconds(engine, prefill_step(engine.spec, pages, 64))
    sizes = list(_sizes(engine))
    with Progress(console=console, transient=True) as progress:
        for kind, first, second in progress.track(sizes, description="measuring"):
            if time.monotonic() > deadline and len(prefills) >= 6 and len(decodes) >= 6:
                break
            if kind == "prefill":
                seconds = await _seconds(engine, prefill_step(engine.spec, pages, first, second))
                prefills.append(PrefillSample(first, second, seconds))
            else:
                seconds = await _seconds(engine, decode_step(engine.spec, pages, first, second))
                decodes.append(DecodeSample(first, first * second, seconds))
    return prefills, decodes


def _sizes(engine: Engine) -> Iterator[tuple[str, int, int]]:
    """(prefill, new, cached) and (decode, batch, context), by rising work."""
    limit = engine.spec.max_model_len
    prefills = [("prefill", n, p) for n in PREFILL_NEW for p in PREFILL_CACHED if n + p <= limit]
    decodes = [("decode", b, c) for b in DECODE_BATCH for c in DECODE_CONTEXT if c <= limit]
    if len(prefills) < 4 or len(decodes) < 3:
        raise ConfigError(f"a context of {limit} tokens is too short to be profiled")
    yield from sorted(
        prefills + decodes, key=lambda size: size[1] * (size[1] + size[2]) if size[0] == "prefill" else size[1] * size[2]
    )


async def _seconds(engine: Engine, slices: list[SequenceSlice]) -> float:
    return statistics.median([(await engine.step(slices)).seconds for _ in range(REPEATS)])


def _num_pages(engine: Engine) -> int:
    """Enough for every size."""
    tokens = max(max(DECODE_BATCH) * max(DECODE_CONTEXT), max(PREFILL_NEW) + max(PREFILL_CACHED))
    return tokens // engine.spec.block_tokens + 1


def _private_slots(engine: Engine) -> Slots:
    spec, count = engine.spec, _num_pages(engine)
    memory = np.zeros(count * spec.slot_bytes, dtype=np.uint8)
    memory += 1  # touch the pages; the values do not matter for time as long as they are ordinary numbers
    return Slots(memory, spec.slot_bytes, np.zeros(count, dtype=np.uint32), np.zeros(count, dtype=np.uint32))


def _copy_bandwidth() -> float:
    """Bytes a second of a copy in memory: what a transfer between nodes of one machine can reach."""
    source = np.ones(COPY_BYTES, dtype=np.uint8)
    target = np.zeros_like(source)
    started = time.perf_counter()
    target[:] = source
    return COPY_BYTES / (time.perf_counter() - started)


def _show(console: Console, prefills: list[PrefillSample], decodes: list[DecodeSample], fitted: FittedCost) -> None:
    table = Table("phase", "size", "measured", "predicted", title="cost model")
    for p in prefills:
        predicted = fitted.prefill_s(p.new_tokens, p.cached_tokens)
        size = f"{p.new_tokens} new on {p.cached_tokens} cached"
        table.add_row("prefill", size, format_duration(p.seconds), format_duration(predicted))
    for d in decodes:
        predicted = fitted.decode_step_s(d.batch, d.context_tokens)
        size = f"{d.batch} sequences, context {d.context_tokens // d.batch}"
        table.add_row("decode", size, format_duration(d.seconds), format_duration(predicted))
    console.print(table)
    for name, fit in (("prefill", fitted.prefill), ("decode", fitted.decode)):
        console.print(f"{name}: relative error p50 {fit.error_p50:.1%}, p90 {fit.error_p90:.1%} over {fit.num_samples} sizes")
