"""KV on a device with memory of its own: pages that follow the arena, loaded and stored layer by layer.

What is proven here and what is not: the whole path, caching, staleness, layer order and partial blocks, runs in the tests
on a CPU, with a second piece of memory as the device's. The CUDA branches (`CudaOverlap`, pinned staging) have been run
on no GPU yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvasir.core.errors import KvLost, ModelError
from kvasir.engine.interface import SequenceSlice, Slots
from kvasir.engine.torch.device_pages import Bools, DevicePages, Ints
from kvasir.engine.torch.kernels import KvLayout, KvView
from kvasir.engine.torch.kv import landing_of
from kvasir.engine.torch.overlap import CudaOverlap, NoOverlap, Overlap

_DEVICE_SHARE = 0.8  # of the memory that is free after the weights; the rest is for activations
_STAGED_LAYERS = 2  # layers of whole blocks on their way to the arena at once


class DeviceKv:
    """`KvAccess` over a device: layer l + 1 is loaded while layer l computes, and new KV goes back after each layer.

    A block that gets many new tokens is stored whole; single tokens (decode) are stored alone, so that a decode step moves
    a few KiB a sequence and not a block. When `end` returns, the arena holds everything: another instance may go on.
    """

    def __init__(self, slots: Slots, layout: KvLayout, *, device: torch.device, num_slots: int | None) -> None:
        """`num_slots` blocks are kept on the device; None takes most of its free memory."""
        self._arena = KvView(torch.from_numpy(slots.memory), layout, slots.stride)
        self._generations = slots.generations
        self._landing = landing_of(slots, layout)
        num_pages = num_slots or _pages_that_fit(device, layout)
        self.view = KvView.empty(num_pages, layout, device)
        self._pages = DevicePages(num_slots=self._arena.num_slots, num_pages=num_pages)
        self._device = device
        self._overlap: Overlap = CudaOverlap(device) if device.type == "cuda" else NoOverlap()
        self._step: _StepPlan | None = None
        self._loaded: dict[int, torch.cuda.Event | None] = {}
        self._storing: deque[_Store] = deque()

    def begin(self, slices: Sequence[SequenceSlice]) -> list[Sequence[int]]:
        layout = self.view.layout
        used = [np.asarray(s.pages[: layout.blocks_of(s.start + len(s.tokens))], dtype=np.int64) for s in slices]
        slots, place = np.unique(np.concatenate(used), return_inverse=True)
        needed, filled = np.zeros_like(slots), np.zeros_like(slots)
        good = [_tokens_in_blocks(len(u), s.start, layout.block_tokens) for u, s in zip(used, slices, strict=True)]
        after = [
            _tokens_in_blocks(len(u), s.start + len(s.tokens), layout.block_tokens) for u, s in zip(used, slices, strict=True)
        ]
        np.maximum.at(needed, place, np.concatenate(good))
        np.maximum.at(filled, place, np.concatenate(after))
        claim = self._pages.claim(slots, generations=self._generations[slots].astype(np.int64), needed=needed)
        self._step = _plan(slots, claim.pages, is_missing=claim.is_missing, needed=needed, filled=filled, device=self._device)
        self._loaded.clear()
        self._landing.begin(slices)
        try:
            self._load(0)
        except KvLost:
            self.abort()
            raise
        return [part.tolist() for part in np.split(claim.pages[place], np.cumsum([len(u) for u in used])[:-1])]

    def before_layer(self, layer: int) -> None:
        if layer + 1 < self.view.layout.num_layers:
            self._load(layer + 1)
        self._overlap.compute_waits(self._loaded.pop(layer))

    def after_layer(self, layer: int) -> None:
        step = self._current()
        if step.has_whole_blocks:
            self._finish_stores(leave=_STAGED_LAYERS - 1)
        with self._overlap.copying_after_compute():
            blocks = self._to_host(_layer_bytes(self.view, layer)[step.whole_pages])
            k, v = _read_tokens(self.view, layer, pages=step.token_pages, offsets=step.token_offsets)
            self._storing.append(_Store(layer, blocks, self._to_host(k), self._to_host(v), self._overlap.record()))

    def end(self) -> None:
        step = self._current()
        self._finish_stores(leave=0)
        self._pages.commit(step.slots, filled=step.filled, is_written=step.is_written)
        self._step = None

    def abort(self) -> None:
        self._pages.forget(self._current().slots)
        self._overlap.synchronize()
        self._storing.clear()
        self._step = None

    def check(self) -> None:
        """Raise InvariantError where the pages' bookkeeping is broken."""
        self._pages.check()

    def _current(self) -> _StepPlan:
        assert self._step is not None, "before_layer, after_layer, end and abort come after begin"
        return self._step

    def _load(self, layer: int) -> None:
        """Start to copy one layer of the step's missing blocks to the device."""
        step = self._current()
        self._landing.wait(layer)
        if len(step.load_slots):
            staged = self._host_buffer((len(step.load_slots), self.view.layout.layer_bytes), torch.uint8)
            torch.index_select(_layer_bytes(self._arena, layer), 0, step.load_slots, out=staged)
            with self._overlap.copying():
                arrived = staged.to(self._device, non_blocking=True)
                _layer_bytes(self.view, layer).index_copy_(0, step.load_pages, arrived)
        self._loaded[layer] = self._overlap.record()

    def _finish_stores(self, *, leave: int) -> None:
        """Write what has arrived on the host into the arena, oldest layer first, until `leave` layers are under way."""
        step = self._current()
        while len(self._storing) > leave:
            store = self._storing.popleft()
            self._overlap.host_waits(store.arrived)
            _layer_bytes(self._arena, store.layer).index_copy_(0, step.whole_slots, store.blocks)
            _write_tokens(self._arena, store.layer, slots=step.token_slots, offsets=step.host_offsets, k=store.k, v=store.v)

    def _to_host(self, values: Tensor) -> Tensor:
        return self._host_buffer(tuple(values.shape), values.dtype).copy_(values, non_blocking=True)

    def _host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned where there is a GPU; torch's allocator reuses such memory once the copies from and to it are over."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._device.type == "cuda")


@dataclass(frozen=True, slots=True)
class _StepPlan:
    """What one step moves. Slots index the arena (host tensors), pages the device (device tensors)."""

    slots: Ints
    filled: Ints
    is_written: Bools
    load_slots: Tensor
    load_pages: Tensor
    whole_slots: Tensor
    whole_pages: Tensor
    token_slots: Tensor
    token_pages: Tensor
    token_offsets: Tensor
    host_offsets: Tensor

    @property
    def has_whole_blocks(self) -> bool:
        return len(self.whole_slots) > 0


@dataclass(frozen=True, slots=True)
class _Store:
    """One layer's new KV on its way to the arena: whole blocks, and K and V of single tokens."""

    layer: int
    blocks: Tensor
    k: Tensor
    v: Tensor
    arrived: torch.cuda.Event | None


def _plan(
    slots: Ints,
    pages: Ints,
    *,
    is_missing: Bools,
    needed: Ints,
    filled: Ints,
    device: torch.device,
) -> _StepPlan:
    is_single, is_whole = filled - needed == 1, filled - needed > 1
    offsets = torch.from_numpy(needed[is_single])
    return _StepPlan(
        slots=slots,
        filled=filled,
        is_written=filled > needed,
        load_slots=torch.from_numpy(slots[is_missing]),
        load_pages=torch.from_numpy(pages[is_missing]).to(device),
        whole_slots=torch.from_numpy(slots[is_whole]),
        whole_pages=torch.from_numpy(pages[is_whole]).to(device),
        token_slots=torch.from_numpy(slots[is_single]),
        token_pages=torch.from_numpy(pages[is_single]).to(device),
        token_offsets=offsets.to(device),
        host_offsets=offsets,
    )


def _tokens_in_blocks(num_blocks: int, num_tokens: int, block_tokens: int) -> Ints:
    """How many of the first `num_tokens` tokens fall into each block."""
    return np.clip(num_tokens - np.arange(num_blocks, dtype=np.int64) * block_tokens, 0, block_tokens)


def _layer_bytes(view: KvView, layer: int) -> Tensor:
    """One layer of every slot, uint8 [slots, layer_bytes], a view."""
    rows = view.base[: view.num_slots * view.slot_stride].view(view.num_slots, view.slot_stride)
    return rows.narrow(1, layer * view.layout.layer_bytes, view.layout.layer_bytes)


def _read_tokens(view: KvView, layer: int, *, pages: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of single tokens."""
    k = view.keys(layer)[pages, :, :, offsets]
    if view.layout.is_packed:
        return k, view.values(layer)[pages, :, offsets // 2, :, offsets % 2]
    return k, view.values(layer)[pages, :, offsets]


def _write_tokens(view: KvView, layer: int, *, slots: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
    view.keys(layer)[slots, :, :, offsets] = k
    if view.layout.is_packed:
        view.values(layer)[slots, :, offsets // 2, :, offsets % 2] = v
        return
    view.values(layer)[slots, :, offsets] = v


def _pages_that_fit(device: torch.device, layout: KvLayout) -> int:
    if device.type != "cuda":
        raise ModelError(f"device KV on {device}: give the number of slots")
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(_DEVICE_SHARE * free) // layout.slot_bytes)
