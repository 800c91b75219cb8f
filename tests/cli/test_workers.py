"""Interrupts of a command that starts processes."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from kvasir.cli.workers import interrupts_held


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["this thread alone", "another thread, too"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """A library's thread does not block interrupts, so that it takes what the main thread blocks."""
    if request.param == "this thread alone":
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    yield
    ended.set()
    thread.join()


def _interrupted(turns: list[int]) -> None:
    with interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        while len(turns) < 100_000:  # Python calls handlers between instructions
            turns.append(len(turns))


@pytest.mark.usefixtures("_threads")
def test_an_interrupt_is_heard_when_the_block_ends() -> None:
    turns: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        _interrupted(turns)
    assert len(turns) == 100_000
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_nothing_is_heard_where_nobody_interrupted() -> None:
    with interrupts_held():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
