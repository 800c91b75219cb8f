"""How long the Batcher thinks: `python -m benchmarks.batcher`; microseconds per event, best of several rounds.

Live: every pass is a step, whose chunks are listed for the engine. Simulated: steps repeat until something happens, and then a
sequence leaves and another joins; an event is a StepDone or a Submitted, with the pages that it asks for.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable

from kvasir.core.batcher_commands import NeedPages, Release, Step
from kvasir.core.events import Event, PagesGranted, StepDone, Submitted
from kvasir.scheduling.batcher import Batcher
from kvasir.scheduling.chunking import BatcherConfig

BATCHES = (1, 32, 128)
EVENTS = 2000
ROUNDS = 7


class _Body:
    """A batcher with sequences that decode, and a pool that answers at once and never runs dry."""

    def __init__(self, batch: int, *, block_tokens: int, max_repeats: int, output: int):
        config = BatcherConfig(block_tokens=block_tokens, max_batch=max(BATCHES), max_repeats=max_repeats)
        self._batcher = Batcher(config)
        self._block_tokens = block_tokens
        self._output = output
        self._next_page = 0
        self._num_submitted = 0
        self._step: Step | None = None
        for _ in range(batch):
            self.submit()

    def submit(self) -> None:
        """A handed-off prompt, of a length of its own."""
        number = self._num_submitted
        self._num_submitted += 1
        prompt = 200 + 37 * number % 4096
        output = self._output + 13 * number % self._output
        pages = self._pages(-(-prompt // self._block_tokens))
        self._handle(Submitted(f"r{number}", prompt + 1, prompt, prompt + output, pages))

    def live_pass(self) -> int:
        deque(self._batcher.decode_chunks(), maxlen=0)
        self._handle(StepDone())
        return 1

    def simulated_event(self) -> int:
        """Repeats the step to its end; who left is followed by another. Returns how many events that took."""
        assert self._step is not None
        num_left = self._handle(StepDone(steps=self._step.repeats))
        events = 1 + num_left
        stays = self._step is not None
        for _ in range(num_left):
            self.submit()
        if num_left and stays:  # nothing of the new step is made yet: let the newcomers join it
            self._handle(StepDone(steps=0))
            events += 1
        return events

    def _handle(self, event: Event) -> int:
        if isinstance(event, StepDone):
            self._step = None
        num_left = 0
        for command in self._batcher.handle(event, 0.0):
            match command:
                case Step():
                    self._step = command
                case NeedPages(count=count):
                    self._handle(PagesGranted(self._pages(count)))
                case Release():
                    num_left += 1
        return num_left

    def _pages(self, count: int) -> tuple[int, ...]:
        self._next_page += count
        return tuple(range(self._next_page - count, self._next_page))


def live_us(batch: int) -> float:
    """Per pass, listing the chunks included."""
    return _best_us(_Body(batch, block_tokens=64, max_repeats=1, output=1_000_000).live_pass)


def simulated_us(batch: int) -> float:
    """Per event, while sequences come and go."""
    return _best_us(_Body(batch, block_tokens=512, max_repeats=1_000_000, output=340).simulated_event)


def _best_us(work: Callable[[], int]) -> float:
    """`work` returns how many events it handled."""
    best = float("inf")
    for _ in range(ROUNDS):
        start, events = time.perf_counter(), 0
        while events < EVENTS:
            events += work()
        best = min(best, (time.perf_counter() - start) / events)
    return round(best * 1e6, 2)


def measure() -> dict[str, dict[str, float]]:
    return {
        "live": {str(batch): live_us(batch) for batch in BATCHES},
        "simulated": {str(batch): simulated_us(batch) for batch in BATCHES},
    }


def main() -> None:
    print(json.dumps({"unit": "us per event", "batch": list(BATCHES), **measure()}))


if __name__ == "__main__":
    main()
