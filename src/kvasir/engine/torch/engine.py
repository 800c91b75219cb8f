"""The embedded engine: one model, its KV in the arena, one thread that computes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, chain
from time import perf_counter
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from kvasir.core.errors import ModelError
from kvasir.engine.interface import ModelSpec, SampledToken, SequenceSlice, Slots, StepResult
from kvasir.engine.stream import Stream
from kvasir.engine.torch.config import DTYPES, check_rope, load_config, quiet_transformers
from kvasir.engine.torch.device_kv import DeviceKv
from kvasir.engine.torch.first_calls import make_first_calls
from kvasir.engine.torch.hf import HfModel
from kvasir.engine.torch.kernels import BatchLayout, KvLayout, Ops, load_ops
from kvasir.engine.torch.kv import KvAccess, in_place_kv
from kvasir.engine.torch.lean import LeanModel, Progress, SampleRows, is_lean
from kvasir.engine.torch.place import place
from kvasir.engine.torch.priority import go_idle, name_threads
from kvasir.engine.torch.sampling import Draw, Sampler
from kvasir.engine.torch.stream import read_rows, write_rows


class Model(Protocol):
    """A forward pass over a step's tokens."""

    def forward(self, tokens: Tensor, batch: BatchLayout, *, kv: KvAccess, sample: SampleRows | None) -> Tensor | None:
        """Logits [S, vocab] of the sampled rows; None without any. KV of all tokens is written."""

    def stage(self, x: Tensor, batch: BatchLayout, *, kv: KvAccess, sample: SampleRows | None, layers: range) -> Tensor | None:
        """These layers alone: from tokens, int64 [T], if they are the first, else from the residual stream [T, hidden].

        Returns the residual stream after them, or after the last layer what `forward` does. Raises ModelError where the
        model cannot be cut.
        """


class TorchEngine:
    """`Engine` for decoder-only checkpoints. The constructor loads the model and blocks; `load` does not.

    Everything is computed in one thread of the engine's own. With `low_priority` that thread, and the workers that it starts,
    run at SCHED_IDLE once the model is there: they take what the machine's other work leaves (for prefill beside decode on
    the same cores).
    `on_progress` is called from that thread. Raises ModelError for a checkpoint that cannot be served right.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        number: int = 0,
        of: int = 1,
        low_priority: bool = False,
        ops: Ops | None = None,
        device_kv_slots: int | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Engine `number` of the `of` on this machine, which share its GPUs. `ops` overrides the kernels.

        `device_kv_slots` blocks are kept on the device; None: what its memory holds, and on a CPU the arena in place.
        """
        self.spec = spec
        self._place = place(device, number=number, of=of)
        self._device = self._place.device
        self._dtype = DTYPES[spec.dtype]
        self._layout = _layout(spec)
        self._ops = ops or load_ops(self._device, dtype=self._dtype, head_dim=spec.shape.head_dim)
        self._device_kv_slots = device_kv_slots
        self._sampler = Sampler()
        self._kv: KvAccess | None = None
        self._stream: Stream | None = None
        self._num_slots = 0
        self._thread = ThreadPoolExecutor(1, "engine", initializer=name_threads if low_priority else None)
        try:
            self._model: Model | None = self._thread.submit(self._load, on_progress).result()
            if low_priority:
                self._thread.submit(go_idle).result()
        except BaseException:
            self._thread.shutdown(wait=False)
            raise

    @classmethod
    async def load(
        cls,
        spec: ModelSpec,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        number: int = 0,
        of: int = 1,
        low_priority: bool = False,
        on_progress: Progress | None = None,
    ) -> TorchEngine:
        """Construct without blocking the event loop."""
        return await asyncio.to_thread(
            cls, spec, device=device, number=number, of=of, low_priority=low_priority, on_progress=on_progress
        )

    @property
    def kernels(self) -> str:
        """Which kernels run and why, for the log."""
        return f"{self._ops.name}: {self._ops.reason}"

    def attach(self, slots: Slots) -> None:
        if self._kv is not None:
            raise RuntimeError("attach: an arena is attached already")
        self._num_slots = len(slots.memory) // slots.stride
        self._stream = Stream(slots, self.spec)
        if self._device.type == "cpu" and self._device_kv_slots is None:
            self._kv = in_place_kv(slots, self._layout)
            return
        on_device = self._device_kv_slots or self._place.pages_that_fit(self._layout, at_most=self._num_slots)
        self._kv = DeviceKv(slots, self._layout, ops=self._ops, device=self._device, num_slots=on_device)

    async def step(self, slices: Sequence[SequenceSlice]) -> StepResult:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.step_now, slices)

    async def close(self) -> None:
        """Wait for the step under way, then free the model and forget the arena."""
        await asyncio.to_thread(self._thread.shutdown)
        if self._kv is not None:
            self._kv.close()
        self._model = self._kv = self._stream = None

    def step_now(self, slices: Sequence[SequenceSlice]) -> StepResult:
        """`step` in the calling thread, for benchmarks; `step` calls it in the engine's thread."""
        started = perf_counter()
        if self._model is None or self._kv is None or self._stream is None:
            raise RuntimeError("step: expected an open engine with an arena attached")
        self._check(slices, self._num_slots, self._stream)
        tokens: dict[str, SampledToken] = {}
        with torch.inference_mode():
            for part in _passes(slices):
                tokens |= self._pass(part, model=self._model, kv=self._kv, stream=self._stream)
        return StepResult(tokens, perf_counter() - started)

    def _load(self, on_progress: Progress | None) -> Model:
        with quiet_transformers(), torch.inference_mode():
            make_first_calls()
            config = load_config(self.spec)
            check_rope(config, self.spec.max_model_len)
            kind = LeanModel if is_lean(self.spec, config) else HfModel
            model = kind(self.spec, config, ops=self._ops, device=self._device, on_progress=on_progress)
        if on_progress is not None:
            on_progress(1.0, "model loaded")
        return model

    def _check(self, slices: Sequence[SequenceSlice], num_slots: int, stream: Stream) -> None:
        """What the forward would not notice and would answer with foreign memory."""
        limit = self.spec.max_model_len
        too_long = next((s for s in slices if s.start + len(s.tokens) > limit), None)
        if too_long is not None:
            raise ValueError(f"step: {too_long.request_id}: expected at most {limit} tokens")
        pages = np.fromiter(chain.from_iterable(s.pages for s in slices), dtype=np.int64)
        if len(pages) and (pages.min() < 0 or pages.max() >= num_slots):
            raise ValueError(f"step: expected pages in 0..{num_slots - 1}, got {pages.min()} to {pages.max()}")
        for s in slices:
            stream.check(s)

    def _pass(self, slices: Sequence[SequenceSlice], *, model: Model, kv: KvAccess, stream: Stream) -> dict[str, SampledToken]:
        """One forward pass: over slices without a stage, or over one with its own."""
        tables = kv.begin(slices)
        try:
            sampled = self._sample(slices, self._logits(slices, tables, model=model, kv=kv, stream=stream))
        except BaseException:
            kv.abort()
            raise
        kv.end()
        return sampled

    def _logits(
        self, slices: Sequence[SequenceSlice], tables: Sequence[Sequence[int]], *, model: Model, kv: KvAccess, stream: Stream
    ) -> Tensor | None:
        """Those of the slices that sample, [S, vocab], or None; a stage that is not the last passes its rows on instead."""
        batch = self._batch(slices, tables)
        sample = self._sample_rows(slices, tables, batch)
        stage = slices[0].stage
        if stage is None:
            return model.forward(self._ids(slices), batch, kv=kv, sample=sample)
        if stage.reads is None:
            x = self._ids(slices)
        else:
            x = read_rows(stream, stage.reads, batch.num_tokens, dtype=self._dtype, device=self._device)
        result = model.stage(x, batch, kv=kv, sample=sample, layers=range(stage.first, stage.last))
        if result is None or stage.writes is None:
            return result
        write_rows(stream, stage.writes, result)
        return None

    def _sample(self, slices: Sequence[SequenceSlice], logits: Tensor | None) -> dict[str, SampledToken]:
        if logits is None:
            return {}
        draws = [Draw(s.request_id, s.sampling, s.start + len(s.tokens)) for s in slices if s.sampling is not None]
        tokens = self._sampler.sample(logits, draws)
        return {draw.request_id: token for draw, token in zip(draws, tokens, strict=True)}

    def _ids(self, slices: Sequence[SequenceSlice]) -> Tensor:
        """The slices' tokens, int64 [T] on the device."""
        return torch.from_numpy(np.concatenate([np.asarray(s.tokens, dtype=np.int64) for s in slices])).to(self._device)

    def _batch(self, slices: Sequence[SequenceSlice], tables: Sequence[Sequence[int]]) -> BatchLayout:
        lens = [len(s.tokens) for s in slices]
        contexts = [s.start + n for s, n in zip(slices, lens, strict=True)]
        return BatchLayout.build(lens, contexts, block_tables=tables, block_tokens=self.spec.block_tokens, device=self._device)

    def _sample_rows(
        self, slices: Sequence[SequenceSlice], tables: Sequence[Sequence[int]], batch: BatchLayout
    ) -> SampleRows | None:
        ends = accumulate(len(s.tokens) for s in slices)
        rows = [end - 1 for end, s in zip(ends, slices, strict=True) if s.sampling is not None]
        if not rows:
            return None
        if len(rows) < batch.num_tokens:
            last = [replace(s, tokens=s.tokens[-1:], start=s.start + len(s.tokens) - 1) for s in slices]
            wanted = [i for i, s in enumerate(slices) if s.sampling is not None]
            batch = self._batch([last[i] for i in wanted], [tables[i] for i in wanted])
        return SampleRows(torch.tensor(rows, device=self._device), batch)


def _passes(slices: Sequence[SequenceSlice]) -> Iterator[list[SequenceSlice]]:
    """All without a stage together, then each with one alone."""
    whole = [s for s in slices if s.stage is None]
    if whole:
        yield whole
    yield from ([s] for s in slices if s.stage is not None)


def _layout(spec: ModelSpec) -> KvLayout:
    shape = spec.shape
    try:
        return KvLayout(shape.num_layers, shape.num_kv_heads, shape.head_dim, spec.block_tokens, DTYPES[spec.dtype])
    except ValueError as error:
        raise ModelError(f"model {spec.path}: {error}") from None
