"""Among many instances, those that can be the best for a prompt: found by columns, so that only they are looked at one by one.

Of instances that have the same prefix of a prompt, the one that is free soonest, and does most of its time prefill, has it
done first; whether it computes the rest itself or fetches the longest prefix before decides which of the two counts for more.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from kvasir.pool.match import PrefixMatch
from kvasir.scheduling.columns import FEW_NODES, PrefillTable
from kvasir.scheduling.policies.choice import NUM_RECORDED
from kvasir.scheduling.view import Floats

if TYPE_CHECKING:
    from kvasir.scheduling.few import FewView


def contenders(table: PrefillTable, view: FewView, match: PrefixMatch, *, now: float, rank: float) -> dict[int, int]:
    """Row → blocks of prefix. Among those of each prefix are the first by each of a policy's plans, or as good (to rounding).

    `view` has the prompt, which would queue at `rank`.
    """
    found: dict[int, int] = {}
    wait_s = table.about_wait_s(now, rank)
    table.see(match)
    for mask, blocks in match.runs:
        if mask.bit_count() <= FEW_NODES:
            for row in table.rows_on(mask):
                found[row] = blocks
                wait_s[row] = math.inf
        else:
            is_on = table.is_on(mask)
            _add_best(found, table.slowness, np.where(is_on, wait_s, math.inf), view, blocks)
            wait_s[is_on] = math.inf
    _add_best(found, table.slowness, wait_s, view, 0)
    return found


def _add_best(found: dict[int, int], slowness: Floats, wait_s: Floats, view: FewView, blocks: int) -> None:
    """Of those that have so many blocks; the wait of all others is infinite."""
    tokens = blocks * view.block_tokens
    computed_s = slowness * view.prefill_s(tokens)
    computed_s += wait_s
    _add_least(found, computed_s, blocks)
    transfer_s = view.transfer_s(view.best_tokens - tokens)
    if transfer_s > 0.0:
        fetched_s = slowness * view.rest_s
        # the wait hides the transfer, or the other way round
        fetched_s += np.maximum(wait_s, transfer_s - view.rest_s) if view.layerwise else wait_s
        _add_least(found, fetched_s, blocks)


def _add_least(found: dict[int, int], seconds: Floats, blocks: int) -> None:
    for _ in range(NUM_RECORDED):
        row = int(seconds.argmin())
        if seconds[row] == math.inf:
            return
        seconds[row] = math.inf
        found[row] = blocks
