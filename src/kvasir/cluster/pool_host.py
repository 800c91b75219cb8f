"""A PoolNode with its arena: the part of a pool's body that a process and a test in one process share."""

from __future__ import annotations

from collections.abc import Callable

from kvasir.cluster.messages import BlocksChanged, HelloPool, PeerPool
from kvasir.core.errors import InvariantError
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import (
    Erase,
    Fetching,
    Leased,
    Loaded,
    Loading,
    OwnerJoined,
    Pinned,
    PoolEvent,
    PoolTick,
    Refused,
    Removed,
    Reserved,
    Spill,
    Stored,
)
from kvasir.core.tier import Tier
from kvasir.pool.node import PoolNode
from kvasir.store.arena import Arena

HUB = "hub"
HUB_EPOCH = 0
"""The hub may withdraw offers; it holds nothing, so its restarts need no epochs."""

MESSENGER = "messenger"
MESSENGER_EPOCH = 0
"""Owner of what the pool's own body brings: it lives as long as the pool."""

Answer = Reserved | Leased | Loading | Fetching | Loaded | Pinned | Refused | None


class PoolHost:
    """Feeds the brain, keeps the slots' generations, and collects which blocks came and went.

    `on_disk` hears of each block that is to be written to the SSD or erased there; whoever writes it says SpillDone.
    """

    def __init__(
        self,
        name: str,
        node: PoolNode,
        arena: Arena,
        clock: Callable[[], float],
        *,
        peer: Callable[[], PeerPool | None] = lambda: None,
    ):
        """`peer` is how other nodes reach this pool, which may change."""
        self.node = node
        self.arena = arena
        self.on_disk: Callable[[Spill | Erase], None] = _no_ssd
        self._name = name
        self._clock = clock
        self._peer = peer
        self._told_peer: PeerPool | None = None
        self._changed: dict[tuple[Tier, BlockKey], bool] = {}
        self._seq = 0
        self._dirty = False
        self.start_over()
        self.node.handle(OwnerJoined(HUB, HUB_EPOCH), clock())
        self.node.handle(OwnerJoined(MESSENGER, MESSENGER_EPOCH), clock())

    def handle(self, event: PoolEvent) -> Answer:
        """The answer for the owner that asked; None when there is nothing to say."""
        answer: Answer = None
        self._dirty = True
        for said in self.node.handle(event, self._clock()):
            match said:
                case Stored(keys=keys, tier=tier):
                    self._changed.update({(tier, key): True for key in keys})
                case Removed(keys=keys, tier=tier):
                    self._changed.update({(tier, key): False for key in keys})
                case Reserved(slots=slots) | Loading(slots=slots) | Fetching(slots=slots):
                    self.arena.generations[list(slots)] += 1
                    self.arena.missing[list(slots)] = 0
                    answer = said
                case Leased() | Loaded() | Pinned() | Refused():
                    answer = said
                case Spill() | Erase():
                    self.on_disk(said)
        if len(self._changed) > 2 * (self.node.num_slots + self.node.stats().ssd_slots):
            self.start_over()
        return answer

    def ask(self, event: PoolEvent) -> Reserved | Leased | Refused | None:
        """As `handle`, for an event that brings nothing from elsewhere."""
        answer = self.handle(event)
        assert not isinstance(answer, Loading | Fetching | Loaded | Pinned), answer
        return answer

    @property
    def now(self) -> float:
        """By the clock that the brain hears."""
        return self._clock()

    @property
    def has_changes(self) -> bool:
        return bool(self._changed) or self._seq == 0

    def tick(self) -> None:
        self.handle(PoolTick(HUB, HUB_EPOCH))
        if not self.needs_hello and self._peer() != self._told_peer:
            self.start_over()

    def changes(self) -> BlocksChanged | None:
        """What changed since `confirm_changes`, the last word on each key; None when nothing did."""
        if not self.has_changes:
            return None
        return BlocksChanged(
            self._name,
            self._seq + 1,
            stored=self._told(Tier.DRAM, is_stored=True),
            removed=self._told(Tier.DRAM, is_stored=False),
            ssd_stored=self._told(Tier.SSD, is_stored=True),
            ssd_removed=self._told(Tier.SSD, is_stored=False),
        )

    def confirm_changes(self) -> None:
        """The last `changes` are on their way."""
        self._seq += 1
        self._changed.clear()

    def start_over(self) -> None:
        """Whoever listens knows nothing: have a hello and the whole inventory, even an empty one, as the next to tell.

        Also when more is untold than the inventory could be, so that a hub that does not listen costs bounded memory.
        """
        self._seq = 0
        self._changed = {(tier, key): True for tier in Tier for key in self.node.inventory(tier)}
        self.needs_hello = True

    def hello(self) -> HelloPool:
        """To be told before any changes when `needs_hello`."""
        self._told_peer = self._peer()
        return HelloPool(self._name, self.node.num_slots, self._told_peer)

    def confirm_hello(self) -> None:
        """The hello is on its way."""
        self.needs_hello = False

    def check_if_dirty(self) -> InvariantError | None:
        """Verify the brain's invariants when something happened since the last time; a broken one is returned, not raised."""
        if not self._dirty:
            return None
        self._dirty = False
        try:
            self.node.check()
        except InvariantError as error:
            return error
        return None

    def _told(self, tier: Tier, *, is_stored: bool) -> tuple[BlockKey, ...]:
        return tuple([key for (where, key), stored in self._changed.items() if where is tier and stored is is_stored])


def _no_ssd(order: Spill | Erase) -> None:
    raise InvariantError(f"a node without an SSD said {order!r}")
