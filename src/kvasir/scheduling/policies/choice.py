"""What a placement policy answers."""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from kvasir.core.commands import Candidate

NUM_RECORDED: Final = 3
"""How many candidates a decision records: the chosen one and the next best."""


@mypyc_attr(acyclic=True)
class Choice:
    """`candidates` begin with the `chosen` one; `why` finishes the sentence "prefill on p3 by ...".

    All `members` will prefill, and the first token is predicted after `ttft_s`.
    """

    __slots__ = ("candidates", "chosen", "members", "ttft_s", "why")

    def __init__(self, candidates: tuple[Candidate, ...], why: str):
        self.candidates = candidates
        self.why = why
        self.chosen = chosen = candidates[0]
        self.members: tuple[str, ...] = chosen.members
        self.ttft_s: float = chosen.ttft_s
