"""KV on a device with memory of its own: pages that follow the arena, loaded and stored layer by layer.

The device's kernels read and write the pinned arena themselves, so the host only says which blocks. The tests run all of it on
a CPU, with a second piece of memory as the device's, and again on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvasir.core.errors import KvLost
from kvasir.engine.interface import SequenceSlice, Slots
from kvasir.engine.torch.device_pages import Bools, Claim, DevicePages, Ints
from kvasir.engine.torch.kernels import KvLayout, KvView, Ops, TokenCopies
from kvasir.engine.torch.kv import landing_of
from kvasir.engine.torch.overlap import CudaOverlap, NoOverlap, Overlap
from kvasir.engine.torch.pinned import host_memory


class DeviceKv:
    """`KvAccess` over a device: layer l + 1 is loaded while layer l computes, and new KV goes back after each layer.

    A block that gets many new tokens is stored whole; single tokens (decode) are stored alone, so that a decode step moves
    a few KiB a sequence and not a block. A stage moves its own layers, and a page that it filled holds no others. When `end`
    returns, the arena holds everything: another instance may go on.
    """

    def __init__(self, slots: Slots, layout: KvLayout, *, ops: Ops, device: torch.device, num_slots: int) -> None:
        """`num_slots` blocks are kept on the device."""
        self._ops = ops
        self._memory = host_memory(slots.memory, device)
        self._arena = KvView(self._memory.bytes, layout, slots.stride)
        self._generations = slots.generations
        self._landing = landing_of(slots, layout)
        self.view = KvView.empty(num_slots, layout, device)
        self._pages = DevicePages(num_slots=self._arena.num_slots, num_pages=num_slots)
        self._device = device
        self._overlap: Overlap = CudaOverlap(device) if device.type == "cuda" else NoOverlap()
        self._step: _StepPlan | None = None
        self._loaded: dict[int, torch.cuda.Event | None] = {}

    def begin(self, slices: Sequence[SequenceSlice]) -> list[Sequence[int]]:
        layout, layers = self.view.layout, _layers_of(slices, self.view.layout.num_layers)
        used = [np.asarray(s.pages[: layout.blocks_of(s.start + len(s.tokens))], dtype=np.int64) for s in slices]
        slots, place = np.unique(np.concatenate(used), return_inverse=True)
        needed, filled = np.zeros_like(slots), np.zeros_like(slots)
        good = [_tokens_in_blocks(len(u), s.start, layout.block_tokens) for u, s in zip(used, slices, strict=True)]
        after = [
            _tokens_in_blocks(len(u), s.start + len(s.tokens), layout.block_tokens) for u, s in zip(used, slices, strict=True)
        ]
        np.maximum.at(needed, place, np.concatenate(good))
        np.maximum.at(filled, place, np.concatenate(after))
        generations = self._generations[slots].astype(np.int64)
        claim = self._pages.claim(slots, generations=generations, needed=needed, layers=layers)
        with self._overlap.copying():
            self._step = _plan(slots, claim, layers=layers, needed=needed, filled=filled, device=self._device)
        self._loaded.clear()
        self._landing.begin(slices)
        try:
            self._load(layers.start)
        except KvLost:
            self.abort()
            raise
        return [part.tolist() for part in np.split(claim.pages[place], np.cumsum([len(u) for u in used])[:-1])]

    def before_layer(self, layer: int) -> None:
        if layer + 1 in self._current().layers:
            self._load(layer + 1)
        if layer in self._loaded:
            self._overlap.compute_waits(self._loaded.pop(layer))

    def after_layer(self, layer: int) -> None:
        step = self._current()
        with self._overlap.copying_after_compute():
            if step.has_whole_blocks:
                blocks = _layer_words(self.view, layer).index_select(0, step.whole_pages)
                _layer_words(self._arena, layer).index_copy_(0, step.whole_slots, blocks)
            if step.has_single_tokens:
                self._ops.copy_tokens(self.view, self._arena, layer=layer, tokens=step.single_tokens)

    def end(self) -> None:
        step = self._current()
        self._overlap.host_waits(self._overlap.record())
        self._pages.commit(step.slots, filled=step.filled, is_written=step.is_written, layers=step.layers)
        self._step = None

    def abort(self) -> None:
        self._pages.forget(self._current().slots)
        self._overlap.synchronize()
        self._step = None

    def close(self) -> None:
        self._memory.close()

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
        if not step.has_missing_blocks:
            return
        with self._overlap.copying():
            blocks = _layer_words(self._arena, layer).index_select(0, step.load_slots)
            _layer_words(self.view, layer).index_copy_(0, step.load_pages, blocks)
            self._loaded[layer] = self._overlap.record()


@dataclass(frozen=True, slots=True)
class _StepPlan:
    """What one step moves; arrays are the host's, tensors the device's. Slots are places in the arena, pages on the device."""

    layers: range
    slots: Ints
    filled: Ints
    is_written: Bools
    load_slots: Tensor
    load_pages: Tensor
    whole_slots: Tensor
    whole_pages: Tensor
    single_tokens: TokenCopies

    @property
    def has_missing_blocks(self) -> bool:
        return len(self.load_slots) > 0

    @property
    def has_whole_blocks(self) -> bool:
        return len(self.whole_slots) > 0

    @property
    def has_single_tokens(self) -> bool:
        return len(self.single_tokens) > 0


def _plan(slots: Ints, claim: Claim, *, layers: range, needed: Ints, filled: Ints, device: torch.device) -> _StepPlan:
    pages, is_missing = claim.pages, claim.is_missing
    is_single, is_whole = filled - needed == 1, filled - needed > 1
    parts = [slots[is_missing], pages[is_missing], slots[is_whole], pages[is_whole]]
    parts += [pages[is_single], slots[is_single], needed[is_single]]
    on_device = torch.from_numpy(np.concatenate(parts)).to(device)
    load_slots, load_pages, whole_slots, whole_pages, *single = torch.split(on_device, [len(part) for part in parts])
    return _StepPlan(
        layers,
        slots=slots,
        filled=filled,
        is_written=filled > needed,
        load_slots=load_slots,
        load_pages=load_pages,
        whole_slots=whole_slots,
        whole_pages=whole_pages,
        single_tokens=TokenCopies(*single),
    )


def _layers_of(slices: Sequence[SequenceSlice], num_layers: int) -> range:
    """What a forward pass over these slices computes."""
    stage = slices[0].stage
    return range(num_layers) if stage is None else range(stage.first, stage.last)


def _tokens_in_blocks(num_blocks: int, num_tokens: int, block_tokens: int) -> Ints:
    """How many of the first `num_tokens` tokens fall into each block."""
    return np.clip(num_tokens - np.arange(num_blocks, dtype=np.int64) * block_tokens, 0, block_tokens)


def _layer_words(view: KvView, layer: int) -> Tensor:
    """One layer of every slot, int64 [slots, layer_bytes / 8], a view; words, because a GPU moves these faster than bytes."""
    rows = view.base[: view.num_slots * view.slot_stride].view(torch.int64).view(view.num_slots, -1)
    words = view.layout.layer_bytes // 8
    return rows.narrow(1, layer * words, words)
