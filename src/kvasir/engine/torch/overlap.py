"""Order between computing on a device and copying to and from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch


class Overlap(Protocol):
    """Order between computing and copying."""

    def copying(self) -> AbstractContextManager[None]:
        """Copies issued within run beside compute."""

    def copying_after_compute(self) -> AbstractContextManager[None]:
        """Copies issued within run beside later compute, after what was issued so far."""

    def record(self) -> torch.cuda.Event | None:
        """A mark after the copies issued so far."""

    def compute_waits(self, mark: torch.cuda.Event | None) -> None:
        """Compute issued from now on starts after the mark."""

    def host_waits(self, mark: torch.cuda.Event | None) -> None:
        """Return after the mark."""

    def synchronize(self) -> None:
        """Return when nothing is under way."""


class NoOverlap:
    """A CPU does one thing after another."""

    @contextmanager
    def copying(self) -> Iterator[None]:
        yield

    @contextmanager
    def copying_after_compute(self) -> Iterator[None]:
        yield

    def record(self) -> None:
        return None

    def compute_waits(self, mark: torch.cuda.Event | None) -> None:
        pass

    def host_waits(self, mark: torch.cuda.Event | None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CudaOverlap:
    """A stream of its own for copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's annotations

    @contextmanager
    def copying(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def copying_after_compute(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def record(self) -> torch.cuda.Event:
        event: torch.cuda.Event = self._stream.record_event()
        return event

    def compute_waits(self, mark: torch.cuda.Event | None) -> None:
        assert mark is not None
        torch.cuda.current_stream(self._device).wait_event(mark)

    def host_waits(self, mark: torch.cuda.Event | None) -> None:
        assert mark is not None
        mark.synchronize()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)
