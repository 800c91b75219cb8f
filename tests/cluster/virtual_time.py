"""An event loop whose clock jumps to the next deadline when every task waits: an hour costs a millisecond."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    """Nothing in these tests touches a file descriptor from outside, so waiting is only ever for time."""

    def __init__(self, jump: Callable[[], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("every task waits, and none for a deadline: a deadlock")
        if timeout > 0:
            self._jump()
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Deadlines are met at their very moment: not at a sum of timeouts, and no two of them together that differ."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self._jump))

    def time(self) -> float:
        return self._now

    def _jump(self) -> None:
        self._now = max(self._now, self._scheduled[0].when())  # type: ignore[attr-defined]
        self._clock_resolution = math.ulp(self._now)


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
