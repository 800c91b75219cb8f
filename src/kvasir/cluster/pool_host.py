"""A PoolNode with its arena: the part of a pool's body that a process and a test in one process share."""

from __future__ import annotations

from collections.abc import Callable

from kvasir.cluster.messages import BlocksChanged, HelloPool
from kvasir.core.errors import InvariantError
from kvasir.core.keys import BlockKey
from kvasir.core.pool_events import Leased, OwnerJoined, PoolEvent, PoolTick, Refused, Removed, Reserved, Stored
from kvasir.pool.node import PoolNode
from kvasir.store.arena import Arena

HUB = "hub"
HUB_EPOCH = 0
"""The hub may withdraw offers; it holds nothing, so its restarts need no epochs."""


class PoolHost:
    """Feeds the brain, keeps the slots' generations, and collects which blocks came and went."""

    def __init__(self, name: str, node: PoolNode, arena: Arena, clock: Callable[[], float]):
        self.node = node
        self.arena = arena
        self._name = name
        self._clock = clock
        self._changed: dict[BlockKey, bool] = {}
        self._seq = 0
        self._dirty = False
        self.start_over()
        self.node.handle(OwnerJoined(HUB, HUB_EPOCH), clock())

    def handle(self, event: PoolEvent) -> Reserved | Leased | Refused | None:
        """The answer for the owner that asked; None when there is nothing to say."""
        answer: Reserved | Leased | Refused | None = None
        self._dirty = True
        for said in self.node.handle(event, self._clock()):
            match said:
                case Stored(keys=keys):
                    self._changed.update(dict.fromkeys(keys, True))
                case Removed(keys=keys):
                    self._changed.update(dict.fromkeys(keys, False))
                case Reserved(slots=slots):
                    self.arena.generations[list(slots)] += 1
                    answer = said
                case Leased() | Refused():
                    answer = said
        if len(self._changed) > 2 * self.node.num_slots:
            self.start_over()
        return answer

    @property
    def has_changes(self) -> bool:
        return bool(self._changed) or self._seq == 0

    def tick(self) -> None:
        self.handle(PoolTick(HUB, HUB_EPOCH))

    def changes(self) -> BlocksChanged | None:
        """What changed since `confirm_changes`, the last word on each key; None when nothing did."""
        if not self.has_changes:
            return None
        stored = tuple(key for key, is_stored in self._changed.items() if is_stored)
        removed = tuple(key for key, is_stored in self._changed.items() if not is_stored)
        return BlocksChanged(self._name, self._seq + 1, stored, removed)

    def confirm_changes(self) -> None:
        """The last `changes` are on their way."""
        self._seq += 1
        self._changed.clear()

    def start_over(self) -> None:
        """Whoever listens knows nothing: have a hello and the whole inventory, even an empty one, as the next to tell.

        Also when more is untold than the inventory could be, so that a hub that does not listen costs bounded memory.
        """
        self._seq = 0
        self._changed = dict.fromkeys(self.node.inventory(), True)
        self.needs_hello = True

    def hello(self) -> HelloPool:
        """To be told before any changes when `needs_hello`."""
        return HelloPool(self._name, self.node.num_slots)

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
