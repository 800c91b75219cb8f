"""One node in virtual time: the brain of its pool, and the pipes of its network and SSD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kvasir.core.events import Inventory
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import (
    Erase,
    Leased,
    Loaded,
    Loading,
    OwnerJoined,
    PoolAnswer,
    PoolEvent,
    Refused,
    Removed,
    Reserved,
    Spill,
    SpillDone,
    SsdBlock,
    SsdFound,
    Stored,
)
from kvasir.core.tier import Tier
from kvasir.pool.node import PoolNode
from kvasir.simulator.agenda import Agenda
from kvasir.simulator.listener import Listener
from kvasir.simulator.network import Flow, Network, Pipe
from kvasir.simulator.spec import NodeSpec

MESSENGER = "messenger"
"""Owner of what a node's pool does for other nodes: it reads what they fetch and writes what they send."""

Answer = Reserved | Leased | Loading | Loaded | Refused | None


class SimNode:
    """Does what cluster/pool_host.py does, without an arena: feeds the brain and tells the conductor of blocks.

    Its SSD writes and reads share bandwidth like flows in a network, and keep their blocks when the node crashes.
    """

    def __init__(
        self,
        spec: NodeSpec,
        make_pool: Callable[[], PoolNode],
        *,
        block_bytes: float,
        agenda: Agenda,
        network: Network,
        listener: Listener,
    ):
        self.spec = spec
        self.id = spec.id
        self._block_bytes = block_bytes
        self._network = network
        self._on_ssd: dict[int, SsdBlock] = {}
        self.outgoing = Pipe(spec.network_bandwidth)
        self.incoming = Pipe(spec.network_bandwidth)
        self.ssd_out = Pipe(spec.ssd_read_bandwidth)
        self.ssd_in = Pipe(spec.ssd_write_bandwidth)
        self._make_pool = make_pool
        self._agenda = agenda
        self._listener = listener
        self._seq = 0
        self.start()

    def start(self) -> None:
        """With empty DRAM, and what an earlier life left on the SSD."""
        self.is_up = True
        self.pool = self._make_pool()
        self._seq = 0
        self.handle(OwnerJoined(MESSENGER, 0))
        if self._on_ssd:
            self.handle(SsdFound(MESSENGER, 0, tuple(self._on_ssd.values())))

    def stop(self) -> None:
        """Crash: of what is on the SSD, remember what can be read, the oldest first."""
        self.is_up = False
        by_key = {block.key: block for block in self._on_ssd.values()}
        kept = [by_key[key] for key in self.pool.inventory(Tier.SSD)]
        self._on_ssd = {block.ssd_slot: block for block in kept}

    def handle(self, event: PoolEvent) -> Answer:
        """The answer for the owner that asked; None when there is nothing to say."""
        return self._hear(self.pool.handle(event, self._agenda.now))

    def _hear(self, answers: list[PoolAnswer]) -> Answer:
        answer: Answer = None
        for said in answers:
            hear = _HEARD.get(type(said))
            if hear is None:
                answer = said  # type: ignore[assignment]
            else:
                hear(self, said)
        return answer

    def _stored(self, said: Stored) -> None:
        self._tell_stored(said.keys, said.tier)

    def _tell_stored(self, keys: tuple[BlockKey, ...], tier: Tier) -> None:
        self._seq += 1
        self._listener.blocks_stored(self.id, self._seq, keys, tier)

    def _removed(self, said: Removed) -> None:
        self._seq += 1
        self._listener.blocks_removed(self.id, self._seq, said.keys, said.tier)

    def _erase(self, said: Erase) -> None:
        for ssd_slot in said.ssd_slots:
            self._on_ssd.pop(ssd_slot, None)

    @property
    def num_blocks(self) -> int:
        """Blocks that can be read here."""
        return self.pool.num_blocks

    def inventory(self) -> Inventory:
        return Inventory(self.spec.id, self._seq, self.pool.inventory(), self.pool.inventory(Tier.SSD))

    def _write(self, spill: Spill) -> None:
        block = SsdBlock(spill.key, spill.ssd_slot, spill.depth)
        self._on_ssd.pop(spill.ssd_slot, None)

        def written(_: Flow) -> None:
            self._on_ssd[block.ssd_slot] = block
            self.handle(SpillDone(MESSENGER, 0, block.ssd_slot, True))

        self._network.start((self.ssd_in,), self._block_bytes, written)

    # --- what is asked most often ------------------------------------------------------------------------------

    def lease(self, owner: str, epoch: int, lease: str, keys: tuple[BlockKey, ...]) -> tuple[int, ...]:
        """Open a lease over the longest prefix of `keys` that is here; its slots."""
        answer = self._hear(self.pool.lease_blocks(owner, epoch, lease, keys, self._agenda.now))
        assert isinstance(answer, Leased), answer
        slots: tuple[int, ...] = answer.slots
        return slots

    def put(self, owner: str, epoch: int, lease: str, keys: tuple[BlockKey, ...]) -> tuple[int, ...]:
        """Publish blocks that have arrived, under a lease of the owner; their slots, fewer when the pool is full."""
        put = self.pool.put_blocks(owner, epoch, lease, keys, self._agenda.now)
        self._hear(put.before)
        if put.stored:
            self._tell_stored(put.stored, _DRAM)
        self._hear(put.after)
        return put.slots

    def offer(self, owner: str, epoch: int, lease: str, slots: tuple[int, ...], deadline_s: float) -> None:
        self._hear(self.pool.offer_lease(owner, epoch, lease, slots, deadline_s, self._agenda.now))

    def release(self, owner: str, epoch: int, lease: str, slots: tuple[int, ...] = ()) -> None:
        self._hear(self.pool.release_lease(owner, epoch, lease, slots, self._agenda.now))

    # --- on behalf of others -----------------------------------------------------------------------------------

    def lend(self, lease: str, keys: tuple[BlockKey, ...]) -> int:
        """Open a lease for a reader elsewhere over the longest prefix of `keys` that is here; its blocks."""
        return len(self.lease(MESSENGER, 0, lease, keys))

    def close(self, lease: str) -> None:
        """Close a lease of the messenger, or one on offer."""
        self.release(MESSENGER, 0, lease)


_DRAM: Final = Tier.DRAM

_HEARD: Final[dict[type[PoolAnswer], Callable[[SimNode, Any], None]]] = {
    Stored: SimNode._stored,
    Removed: SimNode._removed,
    Spill: SimNode._write,
    Erase: SimNode._erase,
}
"""What is not for the owner that asked."""
