"""Where an instance's pages are: slots of its node's pool (CPU), or memory of its own beside it (GPU)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from kvasir.core.errors import InvariantError
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import (
    AdoptLease,
    KeyedSlot,
    Leased,
    LoadDone,
    Loaded,
    Loading,
    LoadStart,
    OwnerLost,
    PutEnd,
    PutRevoke,
    PutStart,
    Reserved,
)
from kvasir.simulator.jobs import Seq
from kvasir.simulator.node import SimNode
from kvasir.simulator.prompts import output_key


class Memory(ABC):
    """What an instance does with pages and blocks; the order of calls is that of cluster/instance.py."""

    def __init__(self, node: SimNode, owner: str, epoch: int, block_tokens: int):
        self._node = node
        self._owner = owner
        self._epoch = epoch
        self._block_tokens = block_tokens

    @abstractmethod
    def open(self, seq: Seq) -> int:
        """Lease the longest prefix of the sequence's known tokens that its node's pool holds; its blocks."""

    @abstractmethod
    def fetched(self, seq: Seq, keys: tuple[BlockKey, ...]) -> int:
        """Blocks that follow the prefix have come from another node: publish them here; how many are usable."""

    def start_load(self, seq: Seq, keys: tuple[BlockKey, ...]) -> int:
        """Have the pool read blocks that follow the prefix from the node's SSD; how many it will."""
        answer = self._node.handle(LoadStart(self._owner, self._epoch, seq.name, keys))
        assert isinstance(answer, Loading), answer
        return len(answer.slots)

    @abstractmethod
    def end_load(self, seq: Seq, keys: tuple[BlockKey, ...], *, is_wanted: bool) -> int:
        """The reads of these are over: publish them, unless nobody wants them any more; how many are usable."""

    @abstractmethod
    def place(self, seq: Seq, num_tokens: int) -> tuple[int, ...] | None:
        """Pages that hold the first `num_tokens`, whose KV is on the node; None when there is no room now."""

    @abstractmethod
    def adopt(self, seq: Seq, num_tokens: int, *, is_local: bool) -> tuple[int, ...] | None:
        """As `place`, for a hand-off that is on offer on this node (`is_local`) or has come from another."""

    @abstractmethod
    def share(self, stages: list[Seq]) -> bool:
        """Where a pipeline's stages share their pages, give them those of the whole prompt. False when there is no room for
        them here, where the last stage is.
        """

    @abstractmethod
    def take_over(self, seq: Seq) -> None:
        """The stages before the sequence, which is the last, are through: what it has published so far can be seen."""

    @abstractmethod
    def is_shared(self, seq: Seq) -> bool:
        """Whether other stages of a pipeline write into the sequence's pages, too."""

    @abstractmethod
    def reserve(self, count: int) -> tuple[int, ...]: ...

    @abstractmethod
    def revoke(self, pages: tuple[int, ...]) -> None: ...

    @abstractmethod
    def publish(self, seq: Seq, first: int, pages: tuple[int, ...]) -> None:
        """The sequence's blocks from `first` on are complete in these pages."""

    @abstractmethod
    def offer(self, seq: Seq, pages: tuple[int, ...], deadline_s: float) -> None: ...

    @abstractmethod
    def release(self, seq: Seq, pages: tuple[int, ...]) -> None: ...

    def lose(self) -> None:
        """The instance has died."""
        self._node.handle(OwnerLost(self._owner, self._epoch))

    @property
    @abstractmethod
    def free_tokens(self) -> int: ...

    @abstractmethod
    def check(self, stashed_pages: int) -> None:
        """Raises InvariantError unless an idle instance with so many pages in its hand holds nothing else."""

    # --- calls to the node's pool, for both kinds of memory ----------------------------------------------------

    def _lease(self, seq: Seq, keys: tuple[BlockKey, ...]) -> tuple[int, ...]:
        seq.has_lease = True
        return self._node.lease(self._owner, self._epoch, seq.name, keys)

    def _usable(self, seq: Seq) -> int:
        """Blocks that can be taken from a cache: at least one token is left to compute."""
        return (seq.num_tokens - 1) // self._block_tokens

    def _end_load(self, seq: Seq, keys: tuple[BlockKey, ...], *, is_wanted: bool) -> tuple[int, ...]:
        """The slots that were read and published. Of a lease that is gone the pool takes the slots back by itself."""
        answer = self._node.handle(LoadDone(self._owner, self._epoch, seq.name))
        if not isinstance(answer, Loaded):
            return ()
        if not is_wanted:
            self._node.handle(PutRevoke(self._owner, self._epoch, answer.slots))
            return ()
        blocks = tuple([KeyedSlot(key, slot) for key, slot in zip(keys, answer.slots, strict=True)])
        self._node.handle(PutEnd(self._owner, self._epoch, seq.name, blocks))
        return answer.slots


class SharedMemory(Memory):
    """Pages are the pool's slots, as live on a CPU: a prefix is leased, a hand-off on one node changes only the lease's owner.

    Blocks with output in them have keys that nobody else can ask for, since a trace does not say what was output. What the last
    stage of a pipeline publishes is held back until the others are through, as live.
    """

    def __init__(self, node: SimNode, owner: str, epoch: int, block_tokens: int):
        super().__init__(node, owner, epoch, block_tokens)
        self._held_back: dict[str, tuple[KeyedSlot, ...]] = {}

    def open(self, seq: Seq) -> int:
        usable = self._usable(seq)
        keys = seq.job.keys[:usable]
        keys += tuple(self._key(seq, index) for index in range(len(keys), usable))
        seq.pages = list(self._lease(seq, keys))
        return len(seq.pages)

    def fetched(self, seq: Seq, keys: tuple[BlockKey, ...]) -> int:
        slots = self._node.put(self._owner, self._epoch, seq.name, keys)
        seq.pages += slots
        return len(slots)

    def end_load(self, seq: Seq, keys: tuple[BlockKey, ...], *, is_wanted: bool) -> int:
        slots = self._end_load(seq, keys, is_wanted=is_wanted)
        seq.pages += slots
        return len(slots)

    def place(self, seq: Seq, num_tokens: int) -> tuple[int, ...] | None:
        return tuple(seq.pages)

    def adopt(self, seq: Seq, num_tokens: int, *, is_local: bool) -> tuple[int, ...] | None:
        if not is_local and not self._receive(seq, num_tokens):
            return None
        answer = self._node.handle(AdoptLease(self._owner, self._epoch, seq.name))
        assert isinstance(answer, Leased), answer
        seq.has_lease = True
        return answer.slots

    def _receive(self, seq: Seq, num_tokens: int) -> bool:
        """Write what the pool lacks of a hand-off from another node, and offer it as the giver would on this node."""
        count = -(-num_tokens // self._block_tokens)
        full = num_tokens // self._block_tokens
        keys = tuple(self._key(seq, index) for index in range(full))
        slots = len(self._lease(seq, keys))
        reserved = self._node.handle(PutStart(self._owner, self._epoch, count - slots))
        assert isinstance(reserved, Reserved), reserved
        if slots + len(reserved.slots) < count:
            self._node.release(self._owner, self._epoch, seq.name, reserved.slots)
            seq.has_lease = False
            return False
        blocks = tuple(KeyedSlot(keys[i], slot) for i, slot in enumerate(reserved.slots[: full - slots], start=slots))
        self._node.handle(PutEnd(self._owner, self._epoch, seq.name, blocks))
        self._node.offer(self._owner, self._epoch, seq.name, reserved.slots[full - slots :], math.inf)
        return True

    def share(self, stages: list[Seq]) -> bool:
        last = stages[-1]
        wanted = -(-last.num_tokens // self._block_tokens) - len(last.pages)
        slots = self.reserve(wanted)
        if len(slots) < wanted:
            self.revoke(slots)
            return False
        self._node.offer(self._owner, self._epoch, last.name, slots, math.inf)
        self.adopt(last, last.num_tokens, is_local=True)
        pages = [*last.pages, *slots]
        for seq in stages:
            seq.pages = pages
        self._held_back[last.name] = ()
        return True

    def take_over(self, seq: Seq) -> None:
        keyed = self._held_back.pop(seq.name, ())
        if keyed:
            self._node.handle(PutEnd(self._owner, self._epoch, seq.name, keyed))

    def is_shared(self, seq: Seq) -> bool:
        return seq.stage is not None or seq.name in self._held_back

    def reserve(self, count: int) -> tuple[int, ...]:
        answer = self._node.handle(PutStart(self._owner, self._epoch, count))
        assert isinstance(answer, Reserved), answer
        return answer.slots

    def revoke(self, pages: tuple[int, ...]) -> None:
        if pages:
            self._node.handle(PutRevoke(self._owner, self._epoch, pages))

    def publish(self, seq: Seq, first: int, pages: tuple[int, ...]) -> None:
        keyed = tuple([KeyedSlot(self._key(seq, first + i), page) for i, page in enumerate(pages)])
        if seq.name in self._held_back:
            self._held_back[seq.name] += keyed
        else:
            self._node.handle(PutEnd(self._owner, self._epoch, seq.name, keyed))

    def offer(self, seq: Seq, pages: tuple[int, ...], deadline_s: float) -> None:
        self._node.offer(self._owner, self._epoch, seq.name, pages, deadline_s)
        seq.has_lease = False

    def release(self, seq: Seq, pages: tuple[int, ...]) -> None:
        self._held_back.pop(seq.name, None)
        self._node.release(self._owner, self._epoch, seq.name, pages)
        seq.has_lease = False

    @property
    def free_tokens(self) -> int:
        stats = self._node.pool.stats()
        return (stats.free + stats.published - stats.leased) * self._block_tokens

    def check(self, stashed_pages: int) -> None:
        """The node's pool knows: it checks itself."""

    def _key(self, seq: Seq, index: int) -> BlockKey:
        keys = seq.job.keys
        return keys[index] if index < len(keys) else output_key(seq.job.number, index)


class DeviceMemory(Memory):
    """Pages are in the instance's own memory (HBM); the node's DRAM pool keeps copies of full prompt blocks.

    Copies between DRAM and HBM pass PCIe layer by layer beside compute and cost no time; a KV that is handed off is in
    its node's DRAM and needs no pages there any more. A lease in the pool pins a sequence's blocks until its prefill is done
    and its KV has left.
    """

    def __init__(self, node: SimNode, owner: str, epoch: int, block_tokens: int, kv_tokens: int):
        super().__init__(node, owner, epoch, block_tokens)
        self.num_pages = kv_tokens // block_tokens
        self._free = list(range(self.num_pages - 1, -1, -1))

    def open(self, seq: Seq) -> int:
        return len(self._lease(seq, seq.job.keys[: self._usable(seq)]))

    def fetched(self, seq: Seq, keys: tuple[BlockKey, ...]) -> int:
        """All are in HBM in any case."""
        self._put(seq, keys)
        self._put_deferred(seq)
        return len(keys)

    def end_load(self, seq: Seq, keys: tuple[BlockKey, ...], *, is_wanted: bool) -> int:
        slots = self._end_load(seq, keys, is_wanted=is_wanted)
        self._put_deferred(seq)
        return len(slots)

    def _put_deferred(self, seq: Seq) -> None:
        """What was computed behind blocks that were still to come."""
        computed, seq.deferred = seq.deferred, None
        if computed:
            self._put(seq, tuple(computed))

    def place(self, seq: Seq, num_tokens: int) -> tuple[int, ...] | None:
        count = -(-num_tokens // self._block_tokens)
        if count > len(self._free):
            return None
        pages = self.reserve(count)
        seq.pages = list(pages)
        return pages

    def adopt(self, seq: Seq, num_tokens: int, *, is_local: bool) -> tuple[int, ...] | None:
        pages = self.place(seq, num_tokens)
        if pages is not None and is_local:
            self._node.close(seq.name)
        return pages

    def share(self, stages: list[Seq]) -> bool:
        return True

    def take_over(self, seq: Seq) -> None:
        pass

    def is_shared(self, seq: Seq) -> bool:
        return False

    def reserve(self, count: int) -> tuple[int, ...]:
        free = self._free
        count = min(count, len(free))
        if not count:
            return ()
        pages = tuple(free[-count:])
        del free[-count:]
        return pages

    def revoke(self, pages: tuple[int, ...]) -> None:
        self._free.extend(pages)

    def publish(self, seq: Seq, first: int, pages: tuple[int, ...]) -> None:
        num_known = len(seq.pages) - first
        seq.pages += pages[num_known:] if num_known > 0 else pages
        if not seq.has_lease:
            return
        keys = seq.job.keys[first : first + len(pages)]
        if not keys:
            return
        if seq.deferred is not None:
            seq.deferred += keys
        else:
            self._put(seq, keys)

    def _put(self, seq: Seq, keys: tuple[BlockKey, ...]) -> None:
        """What follows a block that found no room is worth nothing, and is not put."""
        if seq.puts_end or not seq.has_lease:
            return
        seq.puts_end = len(self._node.put(self._owner, self._epoch, seq.name, keys)) < len(keys)

    def offer(self, seq: Seq, pages: tuple[int, ...], deadline_s: float) -> None:
        self._give_back(seq, pages)
        self._node.offer(self._owner, self._epoch, seq.name, (), math.inf)
        seq.has_lease = False

    def release(self, seq: Seq, pages: tuple[int, ...]) -> None:
        self._give_back(seq, pages)
        if seq.has_lease:
            self._node.release(self._owner, self._epoch, seq.name)
            seq.has_lease = False

    def _give_back(self, seq: Seq, pages: tuple[int, ...]) -> None:
        self._free += seq.pages
        self._free += pages
        seq.pages = []

    @property
    def free_tokens(self) -> int:
        return len(self._free) * self._block_tokens

    def check(self, stashed_pages: int) -> None:
        if len(set(self._free)) != self.num_pages - stashed_pages:
            raise InvariantError(f"{self._owner}: {len(self._free)} pages free, {stashed_pages} in hand, of {self.num_pages}")
