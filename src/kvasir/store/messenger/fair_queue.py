"""Whose slice goes next over a path that many transfers share: by class, and in turn within a class."""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

from kvasir.store.messenger.transport import Priority

RELIEF = 8
"""Every so many slices the lowest class that waits has its turn, so that a stream of hand-offs cannot starve it for ever."""


class Queued(Protocol):
    @property
    def priority(self) -> Priority: ...


Item = TypeVar("Item", bound=Queued)


class FairQueue(Generic[Item]):
    """`next` names the item that goes next; it stays in line until it is removed."""

    def __init__(self) -> None:
        self._lines: dict[Priority, deque[Item]] = {priority: deque() for priority in Priority}
        self._turns = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, item: Item) -> None:
        self._lines[item.priority].append(item)
        self._count += 1

    def remove(self, item: Item) -> None:
        """Nothing happens when it is not here."""
        line = self._lines[item.priority]
        if item in line:
            line.remove(item)
            self._count -= 1

    def next(self) -> Item | None:
        if not self._count:
            return None
        waiting = [line for line in self._lines.values() if line]
        self._turns += 1
        line = waiting[-1 if self._turns % RELIEF == 0 else 0]
        line.rotate(-1)
        return line[-1]
