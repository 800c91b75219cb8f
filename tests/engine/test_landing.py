"""A step waits for each layer of the blocks that are on their way, and fails when they never come."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvasir.core.errors import KvLost
from kvasir.core.request import Sampling
from kvasir.engine.interface import SequenceSlice
from kvasir.engine.landing import LOST, Landing

BLOCK = 4


def slices(*pages: list[int], start: int = 2 * BLOCK) -> list[SequenceSlice]:
    return [SequenceSlice(f"r{n}", [1], start, page, Sampling()) for n, page in enumerate(pages)]


def test_what_is_complete_is_never_waited_for() -> None:
    landing = Landing(np.zeros(8, np.uint32), 3, BLOCK)
    landing.begin(slices([0, 1, 2]))
    assert all(landing.is_here(layer) for layer in range(3))


def test_a_layer_is_here_when_all_cached_blocks_of_the_step_have_it() -> None:
    missing = np.zeros(8, np.uint32)
    missing[[1, 5]] = 3, 2
    landing = Landing(missing, 3, BLOCK)
    landing.begin(slices([0, 1, 7], [4, 5, 6]))
    assert not landing.is_here(0)
    missing[1] = 2
    assert landing.is_here(0)
    assert not landing.is_here(1)
    missing[[1, 5]] = 0
    assert landing.is_here(2)


def test_the_pages_that_the_step_itself_writes_are_not_waited_for() -> None:
    missing = np.zeros(8, np.uint32)
    missing[2] = 3
    landing = Landing(missing, 3, BLOCK)
    landing.begin(slices([0, 1, 2]))
    assert landing.is_here(0)


def test_lost_blocks_name_the_requests_that_wanted_them() -> None:
    missing = np.zeros(8, np.uint32)
    missing[[1, 5]] = 3, LOST
    landing = Landing(missing, 3, BLOCK)
    landing.begin(slices([0, 1, 2], [4, 5, 6]))
    with pytest.raises(KvLost) as lost:
        landing.wait(0)
    assert lost.value.request_ids == ("r1",)


def test_a_waiting_step_goes_on_as_soon_as_its_layer_has_come() -> None:
    missing = np.zeros(8, np.uint32)
    missing[1] = 2
    landing = Landing(missing, 2, BLOCK)
    landing.begin(slices([0, 1, 2]))
    thread = threading.Thread(target=landing.wait, args=(1,))
    thread.start()
    missing[1] = 1
    thread.join(0.05)
    assert thread.is_alive()
    missing[1] = 0
    thread.join(5.0)
    assert not thread.is_alive()
