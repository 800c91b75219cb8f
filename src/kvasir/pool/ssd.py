"""The SSD tier of one node: which block is on it, being written to it or read from it, and what waits to be written.

    DRAM publishes ──▶ waiting ──Spill──▶ writing ──SpillDone──▶ on SSD ──(not in DRAM, nobody reads, space needed)──▶ free
                          └─ evicted from DRAM: dropped   └─ failed ──▶ free

**Write-through.** A block is due as soon as it is published, first come first served: so writes spread over the computation
instead of arriving in one burst at a request's end, a prefix is written before its suffix, a crash loses little, and an
eviction from DRAM costs no write. What is not written when DRAM needs the space is dropped and counted.

**Copies of what DRAM holds are not evicted**; a block joins the SSD's eviction order when DRAM lets go of it. DRAM evicts
suffixes first, so the SSD's order has them first too, and a block that is hot in DRAM does not grow cold here.

**What is gone stays gone.** The place of a block that can be found no longer is erased, unless another block is written over it
at once: or a block that somebody deleted would be back after a restart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import Spill, SsdBlock
from kvasir.pool.eviction import Block, Eviction
from kvasir.pool.slots import SlotTable


@dataclass(slots=True)
class Write:
    """A block on its way from a DRAM slot. It is `given_up` when the SSD evicts it before it has arrived."""

    slot: int
    given_up: bool = False


@dataclass(slots=True)
class SsdCounters:
    """The fields of the same names in PoolStats."""

    spilled: int = 0
    failed_spills: int = 0
    dropped: int = 0
    loaded: int = 0
    failed_loads: int = 0
    ssd_hits: int = 0
    ssd_evictions: int = 0


@dataclass(frozen=True, slots=True)
class Spills:
    """Writes to start, and the keys of the blocks that had to go from the SSD for them."""

    starts: tuple[Spill, ...]
    evicted: tuple[BlockKey, ...]


class SsdTier:
    """Looks at what DRAM holds and marks slots that are being written; all else about DRAM is the node's."""

    def __init__(self, num_slots: int, eviction: Eviction, dram: SlotTable, *, max_spilling: int):
        self.num_slots = num_slots
        self.index: dict[BlockKey, int] = {}  # can be read
        self.free = list(range(num_slots - 1, -1, -1))
        self.waiting: dict[BlockKey, None] = {}  # in DRAM and due to be written, an ordered set
        self.writes: dict[int, Write] = {}  # by ssd slot
        self.to_erase: list[int] = []  # ssd slots, for the node to say
        self.counters = SsdCounters()
        self._writing: dict[BlockKey, int] = {}
        self._blocks: list[Block | None] = [None] * num_slots
        self._idle = eviction
        self._dram = dram
        self._max_spilling = max_spilling

    # --- what happens in DRAM ----------------------------------------------------------------------------------

    def published(self, keys: Iterable[BlockKey], now: float) -> None:
        """These blocks came into DRAM."""
        for key in keys:
            ssd_slot = self._place(key)
            if ssd_slot is None:
                self.waiting[key] = None
            elif not (block := self._block(ssd_slot)).pins:
                self._idle.remove([block], now)

    def evicted(self, blocks: Iterable[Block], now: float) -> None:
        """DRAM let go of these, in this order."""
        for block in blocks:
            ssd_slot = self._place(block.key)
            if ssd_slot is None:
                self.waiting.pop(block.key, None)  # a block whose write failed is not tried again
                self.counters.dropped += 1
                continue
            ours = self._block(ssd_slot)
            ours.uses += block.uses
            ours.deepest = max(ours.deepest, block.deepest)
            if not ours.pins:
                self._idle.add([ours], now)

    # --- writing -----------------------------------------------------------------------------------------------

    def next_spills(self, now: float) -> Spills:
        """What can be started now."""
        starts: list[Spill] = []
        evicted: list[BlockKey] = []
        while self.waiting and len(self.writes) < self._max_spilling and self._make_room(evicted, now):
            key = next(iter(self.waiting))
            del self.waiting[key]
            starts.append(self._start(key, self.free.pop()))
        return Spills(tuple(starts), tuple(evicted))

    def spill_done(self, ssd_slot: int, ok: bool, now: float) -> BlockKey | None:
        """The key that can be read from now on, if any."""
        write = self.writes.pop(ssd_slot)
        self._dram.written(write.slot)
        block = self._block(ssd_slot)
        if not ok:
            self.counters.failed_spills += 1
        if write.given_up or not ok:
            self.to_erase.append(ssd_slot)
        if write.given_up:
            self._free(ssd_slot)
            return None
        del self._writing[block.key]
        if not ok:
            if block.key not in self._dram.index:
                self._idle.forget(block, now)
            self._free(ssd_slot)
            return None
        self.counters.spilled += 1
        self.index[block.key] = ssd_slot
        return block.key

    # --- reading -----------------------------------------------------------------------------------------------

    def prefix(self, keys: Sequence[BlockKey]) -> list[int]:
        """The ssd slots of the longest prefix of `keys` that can be read."""
        slots = []
        for key in keys:
            ssd_slot = self.index.get(key)
            if ssd_slot is None:
                break
            slots.append(ssd_slot)
        return slots

    def pin(self, ssd_slots: Iterable[int], now: float) -> None:
        """These will be read."""
        for ssd_slot in ssd_slots:
            block = self._block(ssd_slot)
            if not block.pins and block.key not in self._dram.index:
                self._idle.remove([block], now)
            block.pins += 1
            block.uses += 1

    def unpin(self, ssd_slots: Sequence[int], failed: Collection[int], now: float) -> tuple[BlockKey, ...]:
        """The reads of one sequence are over; the keys of those that failed, which can be read no longer.

        Another reader of the same copy may still be at it: then its slot waits for that one.
        """
        gone = [self._drop(ssd_slot) for ssd_slot in ssd_slots if ssd_slot in failed]
        for ssd_slot in reversed(ssd_slots):
            block = self._block(ssd_slot)
            block.pins -= 1
            if block.pins:
                continue
            if self.index.get(block.key) != ssd_slot:
                self._free(ssd_slot)
            elif block.key not in self._dram.index:
                self._idle.add([block], now)
        return tuple(key for key in gone if key is not None)

    # --- forgetting --------------------------------------------------------------------------------------------

    def forget(self, keys: Iterable[BlockKey], now: float) -> list[BlockKey]:
        """Neither keep nor write these, except those being read; which of them could be read. DRAM forgets them next."""
        gone = []
        for key in keys:
            self.waiting.pop(key, None)
            ssd_slot = self._place(key)
            if ssd_slot is None or (block := self._block(ssd_slot)).pins:
                continue
            if key not in self._dram.index:
                self._idle.forget(block, now)
            if (write := self.writes.get(ssd_slot)) is not None:
                write.given_up = True
                del self._writing[key]
                continue
            del self.index[key]
            self._free(ssd_slot)
            self.to_erase.append(ssd_slot)
            gone.append(key)
        return gone

    def keys(self) -> list[BlockKey]:
        """Of all blocks that can be read or are being written."""
        return [*self.index, *self._writing]

    # --- starting ----------------------------------------------------------------------------------------------

    def refusal_of(self, blocks: Sequence[SsdBlock]) -> str | None:
        """Why these cannot be what an earlier run left."""
        free = set(self.free)
        places = [block.ssd_slot for block in blocks]
        if bad := sorted(set(places) - free) or [place for place, count in Counter(places).items() if count > 1]:
            return f"ssd slots {bad} are not free or named twice"
        keys = Counter(block.key for block in blocks)
        if known := [key.hex() for key, count in keys.items() if count > 1 or self._place(key) is not None]:
            return f"blocks {known[:3]} are known already or named twice"
        return None

    def found(self, blocks: Sequence[SsdBlock], now: float) -> tuple[BlockKey, ...]:
        """Take these over; the keys that can be read from now on."""
        taken = {block.ssd_slot for block in blocks}
        self.free = [ssd_slot for ssd_slot in self.free if ssd_slot not in taken]
        for found in blocks:
            block = self._blocks[found.ssd_slot] = Block(found.key, found.ssd_slot, found.depth, found.depth, uses=1)
            self.index[found.key] = found.ssd_slot
            if found.key in self._dram.index:
                self.waiting.pop(found.key, None)
            else:
                self._idle.add([block], now)
        return tuple(block.key for block in blocks)

    # --- checking ----------------------------------------------------------------------------------------------

    def problems(self, reads: Iterable[Sequence[int]]) -> Iterator[str]:
        """Each broken invariant, in words; `reads` are the ssd slots of each load."""
        pins = Counter(ssd_slot for read in reads for ssd_slot in read)
        reading = {s: block.pins for s, block in enumerate(self._blocks) if block is not None and block.pins}
        if wrong := {s: count for s, count in reading.items() if count != pins[s]} or pins.keys() - reading.keys():
            yield f"pins on the SSD that no load explains, by ssd slot: {wrong}"
        held = {s: block.key for s, block in enumerate(self._blocks) if block is not None}
        if sorted([*self.free, *held]) != list(range(self.num_slots)):
            yield f"ssd slots that are both free and held, or neither: free {sorted(self.free)}, held {sorted(held)}"
        places = self.index | self._writing
        if len(places) != len(self.index) + len(self._writing) or any(held.get(s) != key for key, s in places.items()):
            yield "the SSD's index, its writes and its blocks disagree"
        given_up = {s for s, write in self.writes.items() if write.given_up}
        if set(self._writing.values()) != self.writes.keys() - given_up:
            yield f"writes {sorted(self.writes)} and keys being written {sorted(self._writing.values())} disagree"
        if stray := held.keys() - set(places.values()) - given_up - pins.keys():
            yield f"ssd slots that hold what nobody can find, reads or writes: {sorted(stray)}"
        if {write.slot for write in self.writes.values()} != self._dram.writing or len(self.writes) > self._max_spilling:
            yield f"writes {self.writes} and slots being written {sorted(self._dram.writing)} disagree, or are too many"
        if not self.waiting.keys() <= self._dram.index.keys() - places.keys():
            yield "what waits to be written is not in DRAM, or on the SSD already"
        idle = sorted(s for key, s in places.items() if key not in self._dram.index and not pins[s])
        order = sorted(block.slot for block in self._idle)
        if order != idle or len(self._idle) != len(idle):
            yield f"the SSD's eviction order holds {order}, not in DRAM and not read are {idle}"

    # --- one block ---------------------------------------------------------------------------------------------

    def _place(self, key: BlockKey) -> int | None:
        """Where the block is, or is being written to."""
        ssd_slot = self.index.get(key)
        return self._writing.get(key) if ssd_slot is None else ssd_slot

    def _block(self, ssd_slot: int) -> Block:
        block = self._blocks[ssd_slot]
        assert block is not None, "only ssd slots in use are asked for"
        return block

    def _start(self, key: BlockKey, ssd_slot: int) -> Spill:
        source = self._dram.index[key]
        self._dram.writing.add(source.slot)
        self._blocks[ssd_slot] = Block(key, ssd_slot, source.depth, source.deepest)
        self.writes[ssd_slot] = Write(source.slot)
        self._writing[key] = ssd_slot
        return Spill(key, source.slot, ssd_slot, source.depth)

    def _make_room(self, evicted: list[BlockKey], now: float) -> bool:
        """Whether there is a free ssd slot now; appends what could be read and was evicted for it."""
        while not self.free:
            victims = self._idle.victims(1, now)
            if not victims:
                return False
            key, ssd_slot = victims[0].key, victims[0].slot
            if (write := self.writes.get(ssd_slot)) is not None:
                write.given_up = True
                del self._writing[key]
                self.counters.dropped += 1
                continue
            del self.index[key]
            self._free(ssd_slot)
            self.counters.ssd_evictions += 1
            evicted.append(key)
        return True

    def _drop(self, ssd_slot: int) -> BlockKey | None:
        """A read failed; the key, unless another reader has found out before."""
        self.counters.failed_loads += 1
        key = self._block(ssd_slot).key
        if self.index.get(key) != ssd_slot:
            return None
        del self.index[key]
        self.to_erase.append(ssd_slot)
        return key

    def _free(self, ssd_slot: int) -> None:
        self._blocks[ssd_slot] = None
        self.free.append(ssd_slot)
