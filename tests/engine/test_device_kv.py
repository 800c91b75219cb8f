"""The device path's bookkeeping and movement, with a second piece of CPU memory as the device's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.core.errors import PoolError
from kvasir.engine.interface import SequenceSlice, Slots
from kvasir.engine.torch.device_kv import DeviceKv
from kvasir.engine.torch.device_pages import DevicePages
from kvasir.engine.torch.kernels import KvLayout, TorchOps
from tests.engine.conftest import GREEDY

LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_dim=16, block_tokens=16, dtype=torch.bfloat16)


def ints(*values: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def claim(pages: DevicePages, slots: list[int], *, generation: int = 1, needed: int = 16) -> list[bool]:
    """Claim and fill whole blocks; which were missing."""
    wanted = ints(*slots)
    result = pages.claim(wanted, generations=np.full_like(wanted, generation), needed=np.full_like(wanted, needed))
    pages.commit(wanted, filled=np.full_like(wanted, 16), is_written=np.full(len(slots), False))
    pages.check()
    missing: list[bool] = result.is_missing.tolist()
    return missing


def test_a_block_is_missing_once() -> None:
    pages = DevicePages(num_slots=10, num_pages=4)
    assert claim(pages, [3, 5]) == [True, True]
    assert claim(pages, [5, 3]) == [False, False]


def test_a_block_of_which_nothing_is_read_is_not_loaded() -> None:
    assert claim(DevicePages(num_slots=10, num_pages=4), [3], needed=0) == [False]


def test_a_slot_reserved_anew_is_missing_again() -> None:
    pages = DevicePages(num_slots=10, num_pages=4)
    claim(pages, [3])
    assert claim(pages, [3], generation=2) == [True]


def test_a_copy_of_part_of_a_block_does_not_serve_the_whole() -> None:
    pages = DevicePages(num_slots=10, num_pages=4)
    pages.claim(ints(3), generations=ints(1), needed=ints(0))
    pages.commit(ints(3), filled=ints(5), is_written=np.array([True]))
    assert claim(pages, [3], needed=5) == [False]
    pages.commit(ints(3), filled=ints(5), is_written=np.array([True]))
    assert claim(pages, [3], needed=6) == [True]


def test_the_block_used_longest_ago_makes_room() -> None:
    pages = DevicePages(num_slots=10, num_pages=2)
    claim(pages, [0])
    claim(pages, [1])
    claim(pages, [0])
    claim(pages, [2])
    assert claim(pages, [0]) == [False]
    assert claim(pages, [1]) == [True]


def test_a_step_larger_than_the_device_is_refused_and_changes_nothing() -> None:
    pages = DevicePages(num_slots=10, num_pages=2)
    claim(pages, [0, 1])
    with pytest.raises(PoolError, match="needs 3 blocks at once, the device holds 2"):
        claim(pages, [2, 3, 4])
    assert claim(pages, [0, 1]) == [False, False]


def test_a_failed_step_is_forgotten() -> None:
    pages = DevicePages(num_slots=10, num_pages=2)
    claim(pages, [0, 1])
    pages.forget(ints(1))
    assert claim(pages, [0, 1]) == [False, True]


@given(st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True), max_size=30))
@settings(max_examples=60, deadline=None)
def test_every_slot_of_a_step_has_a_page_of_its_own(steps: list[list[int]]) -> None:
    pages = DevicePages(num_slots=12, num_pages=5)
    held: dict[int, int] = {}
    for slots in steps:
        wanted = ints(*slots)
        result = pages.claim(wanted, generations=np.ones_like(wanted), needed=np.full_like(wanted, 16))
        assert len(set(result.pages.tolist())) == len(slots)
        for slot, page, is_missing in zip(slots, result.pages.tolist(), result.is_missing.tolist(), strict=True):
            assert is_missing or held[slot] == page
            held = {s: p for s, p in held.items() if p != page} | {slot: page}
        pages.commit(wanted, filled=np.full_like(wanted, 16), is_written=np.full(len(slots), False))
        pages.check()


class Moves:
    """A DeviceKv whose model stamps a number per layer into the pages of its new tokens."""

    def __init__(self, num_pages: int) -> None:
        stride = LAYOUT.slot_bytes + 64
        self.slots = Slots(np.zeros(8 * stride, np.uint8), stride, np.zeros(8, np.uint32), np.zeros(8, np.uint32))
        self.kv = DeviceKv(self.slots, LAYOUT, ops=TorchOps("under test"), device=torch.device("cpu"), num_slots=num_pages)

    def step(self, *slices: SequenceSlice, stamp: float) -> list[torch.Tensor]:
        """Write `stamp` + layer for all new tokens; the keys that each layer saw before, [pages, tokens]."""
        tables, seen = self.kv.begin(slices), []
        for layer in range(LAYOUT.num_layers):
            self.kv.before_layer(layer)
            keys, values = self.kv.view.keys(layer), self.kv.view.values(layer)
            used = [page for table in tables for page in table]
            seen.append(keys[used][:, 0, 0, :, 0].clone())
            for s, table in zip(slices, tables, strict=True):
                for position in range(s.start, s.start + len(s.tokens)):
                    page, offset = table[position // 16], position % 16
                    keys[page, :, :, offset] = stamp + layer
                    values[page, :, offset // 2, :, offset % 2] = -stamp - layer
            self.kv.after_layer(layer)
        self.kv.end()
        self.kv.check()
        return seen

    def arena(self, slot: int, layer: int) -> tuple[list[float], list[float]]:
        """K and V of one head and dimension in the arena, token by token."""
        k = self.kv._arena.keys(layer)[slot, 1, 3, :, 1]
        v = self.kv._arena.values(layer)[slot, 1, :, 5, :].flatten()
        return k.tolist(), v.tolist()


def part(start: int, length: int, pages: list[int], name: str = "a") -> SequenceSlice:
    return SequenceSlice(name, [1] * length, start, pages, GREEDY)


def test_new_kv_of_each_layer_is_in_the_arena_after_the_step() -> None:
    moves = Moves(num_pages=4)
    moves.step(part(0, 20, [6, 2]), stamp=10.0)
    for layer in range(3):
        assert moves.arena(6, layer) == ([10.0 + layer] * 16, [-10.0 - layer] * 16)
        assert moves.arena(2, layer)[0][:4] == [10.0 + layer] * 4


def test_a_single_token_is_stored_alone() -> None:
    """Bytes of the block that the step did not write stay as another instance may have left them."""
    moves = Moves(num_pages=4)
    moves.step(part(0, 4, [6]), stamp=10.0)
    moves.kv._arena.keys(0)[6, :, :, 9] = 99.0
    moves.step(part(4, 1, [6]), stamp=20.0)
    keys, _ = moves.arena(6, 0)
    assert keys[:10] == [10.0] * 4 + [20.0, 0.0, 0.0, 0.0, 0.0, 99.0]


def test_each_layer_of_a_missing_block_is_there_before_the_layer_runs() -> None:
    moves = Moves(num_pages=2)
    moves.step(part(0, 16, [6]), stamp=10.0)
    moves.step(part(0, 32, [1, 2], "b"), stamp=20.0)
    seen = moves.step(part(16, 1, [6, 3]), stamp=30.0)
    assert [layer[0].tolist() for layer in seen] == [[10.0 + i] * 16 for i in range(3)]


def test_a_prefix_shared_by_two_sequences_has_one_page() -> None:
    moves = Moves(num_pages=3)
    moves.step(part(0, 16, [6]), stamp=10.0)
    tables = moves.kv.begin([part(16, 2, [6, 1]), part(16, 2, [6, 2], "b")])
    assert tables[0][0] == tables[1][0]
    assert tables[0][1] != tables[1][1]


def test_after_an_abort_the_step_can_be_done_again() -> None:
    moves = Moves(num_pages=2)
    moves.step(part(0, 16, [6]), stamp=10.0)
    moves.kv.begin([part(16, 4, [6, 3])])
    moves.kv.before_layer(0)
    moves.kv.abort()
    seen = moves.step(part(16, 4, [6, 3]), stamp=30.0)
    assert seen[2][0].tolist() == [12.0] * 16
