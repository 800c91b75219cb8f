"""No function of MKL's is first called by several threads at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvasir.engine.checkpoint import read_spec
from kvasir.engine.torch.engine import TorchEngine
from kvasir.engine.torch.first_calls import NAMES, make_first_calls
from tests.engine.conftest import MakeCheckpoint

Sizes = dict[tuple[str, torch.dtype], int]


class _FirstCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How many elements the first call of each operation in this thread had."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: Sizes = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            self.sizes.setdefault((func.overloadpacket.__name__, args[0].dtype), args[0].numel())
        return func(*args, **(kwargs or {}))


def first_calls(work: Callable[[], object]) -> Sizes:
    """As in a process in which nothing was computed yet."""
    make_first_calls.cache_clear()
    with _FirstCalls() as found:
        work()
    return {call: size for call, size in found.sizes.items() if call[0] in NAMES}


def test_each_function_is_called_with_one_element() -> None:
    assert first_calls(make_first_calls) == {(name, dtype): 1 for name in NAMES for dtype in (torch.float32, torch.float64)}


def test_an_engine_makes_them_before_it_computes_anything(checkpoint: MakeCheckpoint) -> None:
    engine = TorchEngine(read_spec(checkpoint(), block_tokens=16))
    assert set(first_calls(lambda: engine._load(None)).values()) == {1}
