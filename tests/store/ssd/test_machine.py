"""Any sequence of writes, reads, kills, power cuts, faults and damage against a dict: a read gives the right bytes or none."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvasir.store.ssd import SsdFile, SsdOutcome, SsdRead, SsdWrite
from kvasir.store.ssd.buffers import aligned
from kvasir.store.ssd.faulty import FaultPlan, FaultyFiles, VolatileFiles
from kvasir.store.ssd.layout import DATA_NAME, TABLE_NAME
from tests.store.ssd.blocks import block_of, key_of, opened

PLACES = 6
SLOT_BYTES = 5000
"""Not whole pages."""

PLACE = st.integers(0, PLACES - 1)
NUMBER = st.integers(0, 9)
"""Few blocks, so that they come again in other places."""

FAULTS = st.sampled_from(
    [
        FaultPlan(torn_write=0.5),
        FaultPlan(flip_on_write=0.5),
        FaultPlan(flip_on_read=0.5),
        FaultPlan(short_read=0.3, short_write=0.3),
        FaultPlan(read_error=0.5, write_error=0.5),
        FaultPlan(no_space=0.5),
        FaultPlan(read_only=0.5),
    ]
)


class SsdMachine(RuleBasedStateMachine):
    """`model` says for each place which block must be there; None where a fault may have taken it: then it may be there."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="kvasir-ssd-"))
        self.must: dict[int, int] = {}
        self.may: dict[int, int] = {}

    @initialize(seed=st.integers(0, 1 << 16), try_direct=st.booleans())
    def start(self, seed: int, try_direct: bool) -> None:
        self.try_direct = try_direct
        self.volatile = VolatileFiles(seed)
        self.faulty = FaultyFiles(seed, ops=self.volatile)
        self.ssd = self.opened()

    def opened(self) -> SsdFile:
        return opened(self.directory, num_slots=PLACES, slot_bytes=SLOT_BYTES, ops=self.faulty, try_direct=self.try_direct)

    def teardown(self) -> None:
        if hasattr(self, "ssd"):
            self.ssd.close()
        shutil.rmtree(self.directory)

    @rule(places=st.lists(PLACE, unique=True, min_size=1), first=NUMBER)
    def write(self, places: list[int], first: int) -> None:
        numbers = {place: (first + i) % 10 for i, place in enumerate(places)}
        writes = [SsdWrite(p, key_of(n), n, block_of(n, SLOT_BYTES)) for p, n in numbers.items()]
        outcomes = self.ssd.write_many(writes)
        is_healthy = self.faulty.plan == FaultPlan()
        for place, outcome in zip(places, outcomes, strict=True):
            assert outcome is SsdOutcome.OK or not is_healthy
            before = (self.must | self.may).get(place)
            self.must.pop(place, None)
            self.may.pop(place, None)
            if outcome is SsdOutcome.OK:
                (self.must if is_healthy else self.may)[place] = numbers[place]
            elif before is not None:
                self.may[place] = before  # neither written nor erased: the next start may find it

    @rule(places=st.lists(PLACE, unique=True, min_size=1), wrong=st.booleans())
    def read(self, places: list[int], wrong: bool) -> None:
        wanted = {p: (self.must | self.may).get(p, 0) + (10 if wrong else 0) for p in places}
        targets = {place: aligned(SLOT_BYTES) for place in places}
        outcomes = self.ssd.read_many([SsdRead(p, key_of(wanted[p]), targets[p]) for p in places])
        for place, outcome in zip(places, outcomes, strict=True):
            if outcome is SsdOutcome.OK:
                assert not wrong
                assert np.array_equal(targets[place], block_of(wanted[place], SLOT_BYTES))
                assert place in self.must or place in self.may
            elif not wrong and self.faulty.plan == FaultPlan():
                assert place not in self.must, f"place {place} lost block {wanted[place]}: {outcome}"
            if outcome is SsdOutcome.CORRUPT:
                self.must.pop(place, None)
                self.may.pop(place, None)

    @rule(place=PLACE)
    def forget(self, place: int) -> None:
        if self.faulty.plan == FaultPlan():
            self.ssd.forget([place])
            self.must.pop(place, None)
            self.may.pop(place, None)

    @rule(is_power_cut=st.booleans(), share=st.floats(0, 1))
    def crash(self, is_power_cut: bool, share: float) -> None:
        """Nothing is flushed or said goodbye to in closing, so what a kill leaves is what closing leaves."""
        self.faulty.plan = FaultPlan()
        self.ssd.close()
        if is_power_cut:
            self.volatile.lose_power(share)
            self.may |= self.must
            self.must = {}
        self.ssd = self.opened()
        found = {block.ssd_slot: block for block in self.ssd.recover()}
        assert len({block.key for block in found.values()}) == len(found), "each block once"
        if not is_power_cut:
            possible = self.must | self.may
            newest = {n for n in self.must.values() if list(possible.values()).count(n) == 1}
            assert {p for p, n in self.must.items() if n in newest} <= found.keys()
            self.must = {p: n for p, n in self.must.items() if p in found}
            assert all(found[p].key == key_of(n) for p, n in self.must.items())
        self.may = {p: int.from_bytes(block.key, "big") for p, block in found.items() if p not in self.must}

    @rule(plan=FAULTS)
    def fall_ill(self, plan: FaultPlan) -> None:
        self.faulty.plan = plan

    @rule()
    def recover_health(self) -> None:
        self.faulty.plan = FaultPlan()

    @rule(name=st.sampled_from([DATA_NAME, TABLE_NAME]), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def damage(self, name: str, where: float, bit: int) -> None:
        """A bit flips anywhere beyond the first page."""
        path = self.directory / name
        with path.open("r+b") as file:
            start = 1 << 20 if name == DATA_NAME else 4096
            offset = start + int(where * (path.stat().st_size - start))
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1 << bit]))
        self.may |= self.must
        self.must = {}

    @invariant()
    def what_is_known_is_in_order(self) -> None:
        if hasattr(self, "ssd"):
            assert {block.ssd_slot for block in self.ssd.recover()} >= self.must.keys()


SsdMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSsdMachine = SsdMachine.TestCase
