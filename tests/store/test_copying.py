"""Every byte is copied and no other touched, whatever the alignment; streaming is tested where the machine has it."""

import ctypes
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.native.cpp import COMPILERS, build
from kvasir.store import copying
from kvasir.store.copying import STREAMED_BYTES, Copy, fastest_copy, plain_copy, streaming_copy

MARGIN = 200


@pytest.fixture(scope="module", params=["plain", "streaming"])
def copy(request: pytest.FixtureRequest) -> Copy:
    if request.param == "plain":
        return plain_copy
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler")
    return streaming_copy(ctypes.CDLL(str(build("kvasir.store"))))


@settings(deadline=None, max_examples=60)
@given(
    length=st.one_of(st.integers(0, 300), st.integers(STREAMED_BYTES - 2, STREAMED_BYTES + 600)),
    to=st.integers(0, 70),
    start=st.integers(0, 70),
    seed=st.integers(0, 9),
)
def test_all_bytes_arrive_and_none_beside_them_changes(copy: Copy, length: int, to: int, start: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = rng.integers(0, 256, length + MARGIN, dtype=np.uint8)
    target = rng.integers(0, 256, length + MARGIN, dtype=np.uint8)
    expected = target.copy()
    expected[to : to + length] = source[start : start + length]
    copy(target[to : to + length], source[start : start + length])
    assert np.array_equal(target, expected)


def test_what_does_not_fit_is_refused_before_anything_is_written(copy: Copy) -> None:
    size = STREAMED_BYTES
    target = np.zeros(2 * size, np.uint8)
    with pytest.raises(ValueError, match=r"could not broadcast|must be contiguous"):
        copy(target[:size], np.ones(size + 1, np.uint8))
    read_only = target[:size]
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match=r"read-only|must be contiguous"):
        copy(read_only, np.ones(size, np.uint8))
    assert not target.any()


def test_streaming_refuses_what_has_gaps() -> None:
    copy = fastest_copy()
    if copy is plain_copy:
        pytest.skip("this machine has no streaming copy; numpy's knows gaps")
    target = np.zeros(2 * STREAMED_BYTES, np.uint8)
    with pytest.raises(ValueError, match="contiguous"):
        copy(target[::2], np.ones(STREAMED_BYTES, np.uint8))
    assert not target.any()


def test_without_a_compiler_the_plain_copy_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    copying.fastest_copy.cache_clear()
    try:
        assert fastest_copy() is plain_copy
    finally:
        copying.fastest_copy.cache_clear()
