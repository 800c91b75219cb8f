"""Our decode rule among many instances: a bound by columns rules most of them out, and who is left is asked number by number.

How long answers stay takes seventy array operations, for instances of which one is chosen. A bound takes three: nowhere does an
answer leave sooner than where it is alone, and the fewer tokens are left, in the smallest batch, the shorter is a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kvasir.core.commands import Candidate
from kvasir.scheduling.decode_choice import DecodeChoice, DecodeRule, least_expected_tbt
from kvasir.scheduling.few import choice_of, expected_batch, roomy_tbt_s
from kvasir.scheduling.fleet import Fleet
from kvasir.scheduling.instance import Instance
from kvasir.scheduling.view import DecodeView, Floats

MOST_ASKED = 32
"""One that is asked takes a few microseconds; all at once, by columns, as long as some sixty."""

DecodeRuleOfMany = Callable[[Fleet, DecodeView, Candidate | None, int], DecodeChoice]


def least_expected_tbt_of_many(fleet: Fleet, view: DecodeView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    """As `least_expected_tbt`, where `view` has all decoders of `fleet`."""
    if prefill is None:
        return least_expected_tbt(view, prefill, kv_tokens)
    search = _Search(fleet, view, prefill.ttft_s, kv_tokens)
    own = fleet[prefill.instance]
    is_shown = own.can_decode and view.transfer_s(view.num_prompt_tokens) > prefill.prefill_s
    if fleet.decodes_both_ways and not is_shown:
        row = search.least_with_room()
        if row is not None:
            return search.choice(fleet.decoders[row])
    if search.asks_left and own.can_decode and (choice := search.choice(own)).fits:
        return choice
    row = search.least()
    return least_expected_tbt(view, prefill, kv_tokens) if row is None else search.choice(fleet.decoders[row])


RULES_OF_MANY: dict[DecodeRule, DecodeRuleOfMany] = {least_expected_tbt: least_expected_tbt_of_many}
"""Decode rule → the same, without a look at everyone."""


class _Search:
    """Asks in order of the bound until nobody who is left can be better. It gives up when `asks_left` is 0."""

    __slots__ = ("_fleet", "_in_s", "_kv_tokens", "_view", "asks_left")

    def __init__(self, fleet: Fleet, view: DecodeView, in_s: float, kv_tokens: int):
        self._fleet = fleet
        self._view = view
        self._in_s = in_s
        self._kv_tokens = kv_tokens
        self.asks_left = MOST_ASKED

    def choice(self, known: Instance) -> DecodeChoice:
        expected = expected_batch(self._fleet, known, self._in_s)
        return choice_of(self._view.costs, expected, self._view.num_prompt_tokens, self._kv_tokens)

    def least(self) -> int | None:
        """The row of the least step time; None if it gave up."""
        return self._least(self._fleet.least_expected(self._in_s), self._tbt_s)

    def least_with_room(self) -> int | None:
        """As `least`, among those that only decode and leave a burst room; None also if there are none."""
        tokens = self._fleet.least_expected(self._in_s)
        np.putmask(tokens, self._fleet.decoders_that_prefill, math.inf)
        return self._least(tokens, self._roomy_tbt_s)

    def _least(self, tokens: Floats, tbt_of: Callable[[int], float]) -> int | None:
        """In order of the `tokens` that none is below. Of equals the first row wins, and is met first: idle ones are alike,
        and one is asked.
        """
        best: int | None = None
        least_s = math.inf
        while self.asks_left:
            row = int(tokens.argmin())
            fewest = float(tokens[row])
            bound_s = math.inf if fewest == math.inf else self._bound_s(fewest)
            if bound_s > least_s or bound_s == math.inf:
                return best
            if bound_s == least_s and best is not None and row > best and self._bound_s(fewest + 1.0) > least_s:
                return best  # who is left is as good at best, and behind it
            tokens[row] = math.inf
            self.asks_left -= 1
            tbt_s = tbt_of(row)
            if tbt_s < least_s or (tbt_s == least_s and best is not None and row < best):
                best, least_s = row, tbt_s
        return None

    def _bound_s(self, context_tokens: float) -> float:
        """What the step time with the request is at least, to the last bit: no cost model gives less for more."""
        return self._view.costs.decode_step_s(1, int(context_tokens) + self._view.num_prompt_tokens)

    def _tbt_s(self, row: int) -> float:
        """As `least_tbt` has it: later than all others where there is no room."""
        known = self._fleet.decoders[row]
        expected = expected_batch(self._fleet, known, self._in_s)
        context_tokens = expected.context_tokens + self._view.num_prompt_tokens
        tbt_s = self._view.costs.decode_step_s(expected.batch + 1, context_tokens)
        is_full = expected.batch >= known.max_batch or self._kv_tokens > expected.free_kv_tokens
        return tbt_s + 1e6 if is_full else tbt_s

    def _roomy_tbt_s(self, row: int) -> float:
        view, expected = self._view, expected_batch(self._fleet, self._fleet.decoders[row], self._in_s)
        return roomy_tbt_s(view.costs, expected, view.num_prompt_tokens, self._kv_tokens, view.tbt_s)
