"""The device path's bookkeeping and movement, with a second piece of CPU memory as the device's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.core.errors import KvLost, PoolError
from kvasir.engine.interface import SequenceSlice, Slots, Stage
from kvasir.engine.landing import LOST
from kvasir.engine.torch.device_kv import DeviceKv
from kvasir.engine.torch.device_pages import DevicePages
from kvasir.engine.torch.kernels import KvLayout, TorchOps
from tests.engine.conftest import GREEDY

LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_dim=16, block_tokens=16, dtype=torch.bfloat16)
LAYERS = range(3)


def ints(*values: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def claim(
    pages: DevicePages, slots: list[int], *, generation: int = 1, needed: int = 16, layers: range = LAYERS, writes: bool = False
) -> list[bool]:
    """Claim and fill whole blocks; which were missing."""
    wanted = ints(*slots)
    generations, counts = np.full_like(wanted, generation), np.full_like(wanted, needed)
    result = pages.claim(wanted, generations=generations, needed=counts, layers=layers)
    pages.commit(wanted, filled=np.full_like(wanted, 16), is_written=np.full(len(slots), writes), layers=layers)
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
    pages.claim(ints(3), generations=ints(1), needed=ints(0), layers=LAYERS)
    pages.commit(ints(3), filled=ints(5), is_written=np.array([True]), layers=LAYERS)
    assert claim(pages, [3], needed=5) == [False]
    pages.commit(ints(3), filled=ints(5), is_written=np.array([True]), layers=LAYERS)
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


@pytest.mark.parametrize("needed", [LAYERS, range(1), range(1, 3)])
def test_a_copy_of_some_layers_serves_no_others(needed: range) -> None:
    pages = DevicePages(num_slots=10, num_pages=2)
    claim(pages, [0], layers=range(1, 2))
    assert claim(pages, [0], layers=needed) == [True]
    assert claim(pages, [0], layers=needed) == [False]


def test_a_copy_of_all_layers_serves_every_stage_until_one_writes() -> None:
    pages = DevicePages(num_slots=10, num_pages=2)
    claim(pages, [0])
    assert claim(pages, [0], layers=range(1)) == [False]
    assert claim(pages, [0], layers=range(1, 3)) == [False]
    assert claim(pages, [0]) == [False]
    assert claim(pages, [0], layers=range(1, 3), writes=True) == [False]
    assert claim(pages, [0], layers=range(1, 3)) == [False]
    assert claim(pages, [0]) == [True]


@given(st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True), max_size=30))
@settings(max_examples=60, deadline=None)
def test_every_slot_of_a_step_has_a_page_of_its_own(steps: list[list[int]]) -> None:
    pages = DevicePages(num_slots=12, num_pages=5)
    held: dict[int, int] = {}
    for slots in steps:
        wanted = ints(*slots)
        result = pages.claim(wanted, generations=np.ones_like(wanted), needed=np.full_like(wanted, 16), layers=LAYERS)
        assert len(set(result.pages.tolist())) == len(slots)
        for slot, page, is_missing in zip(slots, result.pages.tolist(), result.is_missing.tolist(), strict=True):
            assert is_missing or held[slot] == page
            held = {s: p for s, p in held.items() if p != page} | {slot: page}
        pages.commit(wanted, filled=np.full_like(wanted, 16), is_written=np.full(len(slots), False), layers=LAYERS)
        pages.check()


def eight_slots() -> Slots:
    stride = LAYOUT.slot_bytes + 64
    return Slots(np.zeros(8 * stride, np.uint8), stride, np.zeros(8, np.uint32), np.zeros(8, np.uint32))


class Moves:
    """A DeviceKv whose model stamps a number per layer into the pages of its new tokens."""

    def __init__(self, num_pages: int, slots: Slots | None = None) -> None:
        self.slots = slots or eight_slots()
        self.kv = DeviceKv(self.slots, LAYOUT, ops=TorchOps("under test"), device=torch.device("cpu"), num_slots=num_pages)

    def step(self, *slices: SequenceSlice, stamp: float) -> list[torch.Tensor]:
        """Write `stamp` + layer for all new tokens; the keys that each layer saw before, [pages, tokens]."""
        tables, seen, stage = self.kv.begin(slices), [], slices[0].stage
        for layer in LAYERS if stage is None else range(stage.first, stage.last):
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


def part(start: int, length: int, pages: list[int], name: str = "a", *, layers: range = LAYERS) -> SequenceSlice:
    """A slice with a stage, unless it is of all layers."""
    stage = None if layers == LAYERS else Stage(layers.start, layers.stop, reads=None, writes=None)
    return SequenceSlice(name, [1] * length, start, pages, GREEDY, stage)


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


def test_a_stage_moves_its_own_layers() -> None:
    moves = Moves(num_pages=4)
    moves.step(part(0, 20, [6, 2], layers=range(1, 3)), stamp=10.0)
    assert [moves.arena(6, layer)[0] for layer in LAYERS] == [[0.0] * 16, [11.0] * 16, [12.0] * 16]
    assert [moves.arena(2, layer)[0][:4] for layer in LAYERS] == [[0.0] * 4, [11.0] * 4, [12.0] * 4]


def test_a_stage_does_not_load_again_what_it_has_loaded_or_written() -> None:
    writer = Moves(num_pages=4)
    writer.step(part(0, 16, [6]), stamp=10.0)
    moves = Moves(num_pages=4, slots=writer.slots)
    moves.step(part(16, 5, [6, 2], layers=range(1, 3)), stamp=20.0)
    moves.kv._arena.base.zero_()
    seen = moves.step(part(21, 5, [6, 2], layers=range(1, 3)), stamp=30.0)
    assert [layer[0].tolist() for layer in seen] == [[11.0] * 16, [12.0] * 16]
    assert [layer[1].tolist()[:5] for layer in seen] == [[21.0] * 5, [22.0] * 5]


def test_what_others_computed_of_a_block_is_loaded_when_all_layers_are_needed() -> None:
    first = Moves(num_pages=4)
    second = Moves(num_pages=4, slots=first.slots)
    first.step(part(0, 20, [6, 2], layers=range(1)), stamp=10.0)
    second.step(part(0, 20, [6, 2], layers=range(1, 3)), stamp=20.0)
    for moves in (first, second):
        seen = moves.step(part(20, 1, [6, 2]), stamp=30.0)
        assert [layer[0].tolist() for layer in seen] == [[10.0] * 16, [21.0] * 16, [22.0] * 16]
        assert [layer[1].tolist()[:4] for layer in seen] == [[10.0] * 4, [21.0] * 4, [22.0] * 4]


def test_a_stage_that_goes_on_where_all_layers_were_computed_leaves_the_others_behind() -> None:
    first = Moves(num_pages=4)
    second = Moves(num_pages=4, slots=first.slots)
    first.step(part(0, 5, [6]), stamp=10.0)
    first.step(part(5, 5, [6], layers=range(1)), stamp=20.0)
    second.step(part(5, 5, [6], layers=range(1, 3)), stamp=30.0)
    seen = first.step(part(10, 1, [6]), stamp=40.0)
    assert [layer[0].tolist()[:10] for layer in seen] == [
        [10.0] * 5 + [20.0] * 5,
        [11.0] * 5 + [31.0] * 5,
        [12.0] * 5 + [32.0] * 5,
    ]


def test_a_stage_waits_for_its_own_layers_of_blocks_on_their_way() -> None:
    moves = Moves(num_pages=4)
    moves.step(part(0, 16, [6]), stamp=10.0)
    moves.slots.missing[6] = 1
    seen = moves.step(part(16, 4, [6, 2], layers=range(2)), stamp=20.0)
    assert len(seen) == 2
    moves.slots.missing[6] = LOST
    with pytest.raises(KvLost):
        moves.kv.begin([part(16, 4, [6, 2], layers=range(2, 3))])


CUTS = [[LAYERS], [range(1), range(1, 3)], [range(2), range(2, 3)], [range(1), range(1, 2), range(2, 3)]]
Chunks = st.lists(
    st.tuples(st.integers(0, 1), st.integers(1, 20), st.sampled_from(CUTS), st.tuples(*[st.integers(0, 1)] * 3)), max_size=25
)


@given(Chunks)
@settings(max_examples=150, deadline=None)
def test_a_step_reads_what_was_written_last_whichever_device_computed_which_layers(
    chunks: list[tuple[int, int, list[range], tuple[int, ...]]],
) -> None:
    """Two devices, too small for both sequences, compute their chunks whole or in stages; a full sequence begins anew."""
    slots = eight_slots()
    devices, sequences = [Moves(num_pages=3, slots=slots) for _ in range(2)], [[6, 2], [1, 4]]
    written = np.zeros((2, 3, 32))  # of each sequence in each layer, token by token
    lengths = [0, 0]
    for number, (name, count, cut, where) in enumerate(chunks, 1):
        pages, start = sequences[name], lengths[name] % 32
        end = lengths[name] = min(start + count, 32)
        if start == 0:
            slots.generations[pages] += 1
        for layers, device in zip(cut, where, strict=False):
            seen = devices[device].step(part(start, end - start, pages, layers=layers), stamp=8.0 * number)
            for layer, keys in zip(layers, seen, strict=True):
                assert keys.flatten().tolist()[:start] == written[name, layer, :start].tolist()
                written[name, layer, start:end] = 8.0 * number + layer
                stored = [key for slot in pages for key in devices[device].arena(slot, layer)[0]]
                assert stored[:end] == written[name, layer, :end].tolist()
