"""Tokenization beside the event loop: long prompts go to threads, few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvasir.core.errors import RequestError

_INLINE_CHARS = 2048
"""Shorter text is tokenized at once: about 0.5 ms, less than what a hop to a thread costs under load."""


class Tokenization:
    """Runs tokenizer work. Bounded: `threads` at a time, `max_waiting` in line, beyond that RequestError 429."""

    def __init__(self, *, threads: int, max_waiting: int):
        self._threads = asyncio.Semaphore(threads)
        self._bound = threads + max_waiting
        self._num_inside = 0

    async def run(self, work: Callable[[], list[int]], *, num_chars: int) -> list[int]:
        if num_chars <= _INLINE_CHARS:
            return work()
        if self._num_inside >= self._bound:
            message = f"{self._num_inside} long prompts are being tokenized; try again in a second"
            raise RequestError(message, status=429, code="tokenizer_busy")
        self._num_inside += 1
        try:
            async with self._threads:
                return await asyncio.to_thread(work)
        finally:
            self._num_inside -= 1
