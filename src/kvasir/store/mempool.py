"""The pool as a library: MemServe's MemPool (arXiv 2406.17565, section 4) and the Mooncake store's calls.

    with MemPool(num_blocks=1024, block_bytes=1 << 20) as pool:
        pool.put(key, array)                     one copy, then readable by everybody
        pool.get(key, into=array)                one copy
        with pool.match(keys) as found:          the longest prefix, leased: not a byte is copied
            consume(found.blocks)

An *address* is a slot of the arena; block i of a sequence lies at one. A *key* is 16 bytes and names a block together with all
before it (`kvasir.core.keys.block_keys` makes keys from tokens). Every call may be made from any thread. The brain is the
PoolNode that serves in a cluster, with its leases, eviction and SSD tier; no model and no torch is needed. With `listen` other
processes and machines can use the pool as a RemotePool (store/remote_pool.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from kvasir.core.errors import PoolError
from kvasir.core.keys import KEY_BYTES, BlockKey
from kvasir.core.pool_events import (
    DropBlocks,
    Erase,
    Insert,
    KeyedSlot,
    LeaseBlocks,
    Leased,
    LoadDone,
    Loaded,
    Loading,
    LoadStart,
    OwnerJoined,
    PoolAnswer,
    PoolEvent,
    PoolStats,
    PutEnd,
    PutRevoke,
    PutStart,
    Refused,
    ReleaseLease,
    Reserved,
    Spill,
    SpillDone,
    SsdFound,
)
from kvasir.core.tier import Tier
from kvasir.pool.eviction import Eviction
from kvasir.pool.node import PoolNode
from kvasir.store.arena import create_arena
from kvasir.store.copying import fastest_copy
from kvasir.store.messenger import PeerArena, host_identity
from kvasir.store.pool_server import PoolServer
from kvasir.store.remote_pool import Receiver
from kvasir.store.ssd import SsdOutcome, SsdRead, SsdWrite, open_ssd

Bytes = npt.NDArray[np.uint8]

ME = "library"
EPOCH = 0
_ANSWERS = (Reserved, Leased, Loading, Loaded)
LAG_S = 5.0
"""A put that the SSD does not keep up with waits so long; then blocks are dropped, and counted, as in service."""

WRITTEN_S = 60.0
"""No block takes longer to be written to the SSD; a disk that hangs is an error, not a hang."""


@dataclass(frozen=True, slots=True)
class Match:
    """A leased prefix: `addresses[i]` holds block i, and `blocks[i]` is it, uint8 [block_bytes], read only, until `release`.

    `on_ssd` further blocks could be had with `swap_in`. A context manager that releases at its end.
    """

    pool: MemPool
    lease: str
    addresses: tuple[int, ...]
    on_ssd: int

    @property
    def blocks(self) -> list[Bytes]:
        views = [self.pool.block(address) for address in self.addresses]
        for view in views:
            view.flags.writeable = False
        return views

    def release(self) -> None:
        """Idempotent. The blocks may be evicted from now on."""
        self.pool._handle(ReleaseLease(ME, EPOCH, self.lease))

    def __len__(self) -> int:
        return len(self.addresses)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class MemPool:
    """Raises ConfigError when the memory or the disk cannot hold it, PoolError for what makes no sense or finds no room."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_bytes: int,
        ssd_path: Path | str | None = None,
        ssd_blocks: int = 0,
        identity: str = "library",
        eviction: Eviction | None = None,
        listen: str | None = None,
    ):
        """`ssd_path` is a directory; what is on its SSD tier is there after a restart, if `identity` is the same.

        `listen` is HOST:PORT, where others reach this machine; port 0 lets the system choose (see `address`).
        """
        self.block_bytes = block_bytes
        self._copy = fastest_copy()
        self._arena = create_arena(num_blocks, block_bytes)
        self._file = None
        if ssd_path is not None and ssd_blocks:
            self._file = open_ssd(ssd_path, num_slots=ssd_blocks, slot_bytes=block_bytes, identity=identity)
        self._node = PoolNode(num_blocks, eviction, ssd_slots=ssd_blocks if self._file is not None else 0)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._spills: list[Spill] = []
        self._numbers = count(1)
        self._closed = False
        self._handle(OwnerJoined(ME, EPOCH))
        self._writer = None
        if self._file is not None:
            self._handle(SsdFound(ME, EPOCH, tuple(self._file.recover())))
            self._writer = threading.Thread(target=self._write_out, name="mempool-ssd", daemon=True)
            self._writer.start()
        self._server: PoolServer | None = None
        if listen is not None:
            try:
                self._server = PoolServer(self, self._arena, listen)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Write out what is due, then let go of memory and files. Views of blocks stay readable as long as they are held."""
        if self._closed:
            return
        if self._server is not None:
            self._server.close()
        if self._file is not None:
            self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._writer is not None:
            self._writer.join(WRITTEN_S)
        if self._file is not None:
            self._file.close()
        self._arena.close()

    # --- MemServe's calls: memory and index --------------------------------------------------------------------

    def alloc(self, num_blocks: int) -> tuple[int, ...]:
        """Addresses of blocks to write, evicting historical ones as needed. All or PoolError."""
        answer = self._handle(PutStart(ME, EPOCH, num_blocks))
        assert isinstance(answer, Reserved), answer
        if len(answer.slots) < num_blocks:
            self.free(answer.slots)
            raise PoolError(f"no room for {num_blocks} blocks: {len(answer.slots)} of {self._node.num_slots} can be had")
        return answer.slots

    def free(self, addresses: Sequence[int]) -> None:
        """Give allocated blocks back, unused."""
        if addresses:
            self._handle(PutRevoke(ME, EPOCH, tuple(addresses)))

    def block(self, address: int) -> Bytes:
        """The memory of a block, uint8 [block_bytes]; write it only while it is allocated and not inserted."""
        if not 0 <= address < self._node.num_slots:
            raise PoolError(f"address {address} does not exist; there are {self._node.num_slots} blocks")
        return self._arena.slot(address)

    def insert(self, keys: Sequence[BlockKey], addresses: Sequence[int]) -> None:
        """Make written blocks readable under their keys, a sequence in order; they are the pool's from now on (historical KV).

        A key that is there already keeps its block, and the newcomer's memory is freed.
        """
        self._publish(self._checked(keys), addresses)

    def match(self, keys: Sequence[BlockKey]) -> Match:
        """Lease the longest prefix of `keys` that is in DRAM."""
        lease = f"match#{next(self._numbers)}"
        answer = self._handle(LeaseBlocks(ME, EPOCH, lease, self._checked(keys)))
        assert isinstance(answer, Leased), answer
        return Match(self, lease, answer.slots, answer.on_ssd)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget blocks, in DRAM and on the SSD, except leased ones."""
        self._handle(DropBlocks(ME, EPOCH, self._checked(keys)))

    def swap_out(self, keys: Sequence[BlockKey]) -> int:
        """Wait until these blocks are on the SSD; how many are. DRAM keeps them until it needs the room."""
        self.flush()
        on_ssd = frozenset(self._inventory(Tier.SSD))
        return sum(key in on_ssd for key in self._checked(keys))

    def swap_in(self, keys: Sequence[BlockKey]) -> int:
        """Read the longest prefix back to DRAM; how many blocks of it are there then."""
        with self.match(keys) as found:
            if not found.on_ssd or self._file is None:
                return len(found)
            rest = self._checked(keys)[len(found) : len(found) + found.on_ssd]
            return len(found) + self._load(found.lease, rest)

    def transfer(self, to: Receiver, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy blocks into another pool's memory, which `to.alloc` gave. The source must stay as it is meanwhile."""
        if to.block_bytes != self.block_bytes or len(source) != len(target):
            sizes = f"{len(source)} of {self.block_bytes} bytes to {len(target)} of {to.block_bytes}"
            raise PoolError(f"blocks do not fit each other: {sizes}")
        to.receive(self, source, target)

    def transfer_with_insert(self, to: Receiver, keys: Sequence[BlockKey], source: Sequence[int]) -> None:
        """Copy blocks to another pool, which allocates them; they appear there under their keys when all are complete."""
        target = to.alloc(len(source))
        try:
            self.transfer(to, source, target)
            to.insert(keys, target)
        except BaseException:
            to.free(target)
            raise

    def receive(self, giver: MemPool, source: Sequence[int], target: Sequence[int]) -> None:
        """The receiver's part of `transfer`: copy the giver's blocks `source` into allocated blocks `target` here."""
        for there, here in zip(source, target, strict=True):
            self._copy(self.block(here), giver.block(there))

    # --- the Mooncake store's calls: objects -------------------------------------------------------------------

    def put(self, key: BlockKey, value: npt.NDArray[np.generic]) -> None:
        """Copy one block in: `value` has block_bytes bytes, contiguous, of any dtype and shape."""
        self.batch_put([key], [value])

    def get(self, key: BlockKey, into: npt.NDArray[np.generic] | None = None) -> Bytes:
        """Copy one block out, from DRAM or the SSD. Raises PoolError when it is nowhere."""
        return self.batch_get([key], None if into is None else [into])[0]

    def batch_put(self, keys: Sequence[BlockKey], values: Sequence[npt.NDArray[np.generic]]) -> None:
        """As `put`, each block by itself, in two calls of the brain. All or PoolError.

        With an SSD that is slower than the caller, waits for it, up to LAG_S, rather than lose blocks that it has not yet.
        """
        if len(keys) != len(values):
            raise PoolError(f"{len(keys)} keys for {len(values)} blocks")
        checked, flat = self._checked(keys), [self._flat(value) for value in values]
        if self._file is not None:
            with self._changed:
                self._changed.wait_for(partial(self._loses_nothing, len(keys)), LAG_S)
        addresses = self.alloc(len(keys))
        copy, memory, stride, size = self._copy, self._arena.memory, self._arena.stride, self.block_bytes
        for address, value in zip(addresses, flat, strict=True):
            start = address * stride
            copy(memory[start : start + size], value)
        self._publish(checked, addresses)

    def batch_get(self, keys: Sequence[BlockKey], into: Sequence[npt.NDArray[np.generic]] | None = None) -> list[Bytes]:
        """As `get`, each key by itself."""
        targets = [np.empty(self.block_bytes, np.uint8) for _ in keys] if into is None else [self._flat(one) for one in into]
        for key, target in zip(keys, targets, strict=True):
            with self._found(key) as found:
                start = found.addresses[0] * self._arena.stride
                self._copy(target, self._arena.memory[start : start + self.block_bytes])
        return targets

    def exists(self, key: BlockKey) -> Tier | None:
        """The fastest tier that has the block."""
        with self.match([key]) as found:
            if len(found):
                return Tier.DRAM
            return Tier.SSD if found.on_ssd else None

    def change_replica(self, key: BlockKey, holders: Sequence[Receiver]) -> None:
        """Make each of these pools hold a copy of the block."""
        with self._found(key) as found:
            for pool in holders:
                if pool.exists(key) is None:
                    self.transfer_with_insert(pool, [key], found.addresses)

    def pin(self, keys: Sequence[BlockKey]) -> Match:
        """Keep blocks in DRAM until the returned lease is released."""
        self.swap_in(keys)
        return self.match(keys)

    # --- looking at it -----------------------------------------------------------------------------------------

    @property
    def address(self) -> str | None:
        """HOST:PORT for the RemotePools of others; None without `listen`."""
        return self._server.address if self._server is not None else None

    @property
    def peer(self) -> PeerArena:
        """Where other processes find the memory: by shared memory on this machine, over TCP with `listen`."""
        data_address = self._server.data_address if self._server is not None else None
        return PeerArena(f"process-{self._arena.handle.pid}", self._arena.handle, host_identity(), tcp=data_address)

    def stats(self) -> PoolStats:
        with self._changed:
            return self._node.stats()

    def check(self) -> None:
        """Raises InvariantError unless every block is in exactly one place."""
        with self._changed:
            self._node.check()

    def flush(self) -> None:
        """Wait until all that is due is on the SSD. Raises PoolError when the disk does not take it in time."""
        with self._changed:
            if not self._changed.wait_for(self._is_written, WRITTEN_S):
                raise PoolError(f"the SSD has not taken all blocks within {WRITTEN_S:g} s")

    # --- the rest ----------------------------------------------------------------------------------------------

    def _handle(self, event: PoolEvent) -> PoolAnswer | None:
        """Tell the brain; its answer, or PoolError when it refuses."""
        with self._lock:
            if self._closed:
                raise PoolError("the pool is closed")
            answer: PoolAnswer | None = None
            for said in self._node.handle(event, time.monotonic()):
                if isinstance(said, _ANSWERS):
                    answer = said
                elif isinstance(said, Spill):
                    self._spills.append(said)
                    self._changed.notify_all()
                elif isinstance(said, Erase):
                    assert self._file is not None, "what is to be erased was written"
                    self._file.forget(said.ssd_slots)
                elif isinstance(said, Refused):
                    raise PoolError(said.message)
            return answer

    def _publish(self, keys: tuple[BlockKey, ...], addresses: Sequence[int]) -> None:
        if len(keys) != len(addresses):
            raise PoolError(f"{len(keys)} keys for {len(addresses)} addresses")
        blocks = tuple([KeyedSlot(key, address) for key, address in zip(keys, addresses, strict=True)])
        self._handle(Insert(ME, EPOCH, blocks))

    def _found(self, key: BlockKey) -> Match:
        found = self.match([key])
        if len(found):
            return found
        found.release()
        if found.on_ssd and self.swap_in([key]):
            again = self.match([key])
            if len(again):
                return again
            again.release()
        raise PoolError(f"block {key.hex()} is not here")

    def _load(self, lease: str, keys: tuple[BlockKey, ...]) -> int:
        """Read blocks that follow on those of the lease; how many were good. Memory that is being written out is waited for."""
        assert self._file is not None, "what is on the SSD was read from one"
        with self._changed:
            self._changed.wait_for(lambda: self._is_written() or self._loses_nothing(len(keys)), LAG_S)
        loading = self._handle(LoadStart(ME, EPOCH, lease, keys))
        if not isinstance(loading, Loading) or not loading.slots:
            return 0
        reads = [
            SsdRead(ssd_slot, key, self._arena.slot(slot))
            for ssd_slot, key, slot in zip(loading.ssd_slots, keys, loading.slots, strict=False)
        ]
        outcomes = self._file.read_many(reads)
        failed = tuple([r.ssd_slot for r, outcome in zip(reads, outcomes, strict=True) if outcome is not SsdOutcome.OK])
        loaded = self._handle(LoadDone(ME, EPOCH, lease, failed))
        if not isinstance(loaded, Loaded):
            return 0
        blocks = tuple([KeyedSlot(key, slot) for key, slot in zip(keys, loaded.slots, strict=False)])
        self._handle(PutEnd(ME, EPOCH, lease, blocks))
        return len(blocks)

    def _write_out(self) -> None:
        """The thread that writes blocks to the SSD, in the brain's order, until the pool is closed."""
        assert self._file is not None, "there is something to write to"
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._spills or self._closed)
                spills, self._spills = self._spills, []
            if not spills:
                return
            writes = [SsdWrite(s.ssd_slot, s.key, s.depth, self._arena.slot(s.slot)) for s in spills]
            for spill, outcome in zip(spills, self._file.write_many(writes), strict=True):
                self._handle(SpillDone(ME, EPOCH, spill.ssd_slot, outcome is SsdOutcome.OK))
            with self._changed:
                self._changed.notify_all()

    def _loses_nothing(self, num_blocks: int) -> bool:
        """Whether so many slots are free or hold, unleased, what the SSD has: the newest blocks are those it lacks."""
        stats = self._node.stats()
        safe = stats.free + stats.published - stats.leased - stats.spills_waiting - stats.writing
        return min(num_blocks, self._node.num_slots) <= max(0, safe)

    def _is_written(self) -> bool:
        stats = self._node.stats()
        return not (self._spills or stats.writing or stats.spills_waiting)

    def _inventory(self, tier: Tier) -> tuple[BlockKey, ...]:
        with self._changed:
            return self._node.inventory(tier)

    def _flat(self, value: npt.NDArray[np.generic]) -> Bytes:
        if value.nbytes != self.block_bytes or not value.flags.c_contiguous:
            kind = "contiguous" if value.flags.c_contiguous else "not contiguous"
            raise PoolError(f"block of {value.nbytes} bytes, {kind}: expected {self.block_bytes} contiguous bytes")
        if value.ndim == 1 and value.dtype == np.uint8:
            return value.view(np.uint8)  # the usual case, without a call that it does not need
        return value.reshape(-1).view(np.uint8)

    def _checked(self, keys: Sequence[BlockKey]) -> tuple[BlockKey, ...]:
        if bad := [key for key in keys if len(key) != KEY_BYTES]:
            raise PoolError(f"key of {len(bad[0])} bytes, expected {KEY_BYTES}")
        return tuple(keys)
