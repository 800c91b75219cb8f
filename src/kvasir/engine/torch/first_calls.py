"""The first call of each of MKL's vector math functions, made by one thread: two at once may get wrong numbers.

MKL chooses the kernel of a function at its first call. Where several of torch's threads make that call together, each with its
part of a tensor, one may run a kernel of half the precision, once: no later call shows it. Rotary tables are such a first call,
and all keys that a process writes inherit the error. Without these calls one process in 2,000 on a busy machine had half of its
cosine table wrong by 1.5e-4, with them none of 39,850. https://github.com/pytorch/pytorch/issues/188792 has the cause.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch

NAMES: Final = (
    *(
        "acos",
        "asin",
        "atan",
        "cos",
        "cosh",
        "erf",
        "erfc",
        "erfinv",
        "exp",
        "exp2",
        "expm1",
        "lgamma",
        "log",
        "log10",
        "log1p",
    ),
    *("log2", "sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
)
"""The elementwise functions for which torch asks MKL, and some for which it may."""


@cache
def make_first_calls() -> None:
    """Call it before the process's first computation with torch; takes a millisecond."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for name in NAMES:
            getattr(torch, name)(one)
