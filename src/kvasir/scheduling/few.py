"""What a policy sees where instances are few: the same numbers as in view.py's columns, one by one.

An array operation on a dozen rows takes as long as on a hundred, and a decision makes some ninety of them. Up to FEW
instances policies that have a `place_few` are asked that instead; it must choose the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kvasir.core.commands import Candidate
from kvasir.costs.quick import QuickCosts
from kvasir.pool.match import PrefixMatch
from kvasir.scheduling.decode_choice import FULL, DecodeChoice, DecodeRule, least_expected_tbt, least_tbt, stay
from kvasir.scheduling.fleet import Fleet
from kvasir.scheduling.instance import Instance
from kvasir.scheduling.view import staged

FEW = 128
"""Instances up to which numbers are used: as machine code they are faster up to some hundred and fifty, else up to sixty."""


class FewView:
    """The cluster at one moment, for one prompt. `wait_s`, `pace` and `prefix_tokens` have a number for each of `prefillers`.

    All else is as in ClusterView. Valid until the fleet changes.
    """

    __slots__ = (
        "_known_s",
        "best_tokens",
        "chunk_tokens",
        "costs",
        "decoders",
        "due_in_s",
        "fleet",
        "kv_bytes_per_token",
        "layerwise",
        "max_stages",
        "num_prompt_tokens",
        "pace",
        "prefillers",
        "prefix_tokens",
        "source",
        "tbt_s",
        "wait_s",
    )

    def __init__(
        self,
        fleet: Fleet,
        match: PrefixMatch,
        *,
        num_prompt_tokens: int,
        now: float,
        rank: float,
        due_s: float,
        tbt_s: float,
        costs: QuickCosts,
        kv_bytes_per_token: int,
        block_tokens: int,
        chunk_tokens: int | None,
        layerwise: bool,
        max_stages: int,
    ):
        self.fleet = fleet
        self.prefillers = fleet.prefillers
        self.decoders = fleet.decoders
        books = [known.book for known in self.prefillers]
        self.wait_s = [book.wait_s(now, rank) for book in books]
        self.pace = [book.pace for book in books]
        self.prefix_tokens = [count * block_tokens for count in fleet.blocks_at_prefillers(match)]
        self.num_prompt_tokens = num_prompt_tokens
        self.best_tokens = match.best * block_tokens
        self.source = match.source
        self.costs = costs
        self.kv_bytes_per_token = kv_bytes_per_token
        self.chunk_tokens = chunk_tokens
        self.due_in_s = due_s - now
        self.tbt_s = tbt_s
        self.layerwise = layerwise
        self.max_stages = max_stages
        self._known_s: dict[int, float] = {}

    def prefill_s(self, cached_tokens: int) -> float:
        known_s = self._known_s.get(cached_tokens)
        if known_s is None:
            known_s = self.costs.prompt_s(self.num_prompt_tokens, cached_tokens, self.chunk_tokens)
            self._known_s[cached_tokens] = known_s
        return known_s

    def transfer_s(self, tokens: int) -> float:
        return self.costs.transfer_s(tokens * self.kv_bytes_per_token) if tokens > 0 else 0.0

    def local_and_fetch_s(self) -> list[tuple[float, float]]:
        """For each of `prefillers`, as ClusterView's `local_s` and `fetch_s`."""
        best, is_layerwise = self.best_tokens, self.layerwise
        rest_s = self.prefill_s(best)
        by_prefix = {prefix: (self.prefill_s(prefix), self.transfer_s(best - prefix)) for prefix in set(self.prefix_tokens)}
        never = math.inf
        seconds: list[tuple[float, float]] = []
        for row, prefix in enumerate(self.prefix_tokens):
            prefill_s, transfer_s = by_prefix[prefix]
            pace = self.pace[row]
            if transfer_s <= 0.0:
                seconds.append((prefill_s / pace, never))
                continue
            if is_layerwise:
                transfer_s = transfer_s - self.wait_s[row] - rest_s
                if transfer_s < 0.0:
                    transfer_s = 0.0
            seconds.append((prefill_s / pace, transfer_s + rest_s / pace))
        return seconds

    def local(self, row: int) -> Candidate:
        prefix = self.prefix_tokens[row]
        prefill_s = self.prefill_s(prefix) / self.pace[row]
        return Candidate(self.prefillers[row].id, self.wait_s[row], 0.0, prefill_s, prefix)

    def pipeline(self, rows: list[int]) -> Candidate:
        group = tuple([self.prefillers[row].id for row in rows])
        return staged(self, group, wait_s=max([self.wait_s[row] for row in rows]), pace=min([self.pace[row] for row in rows]))

    def fetch(self, row: int, seconds: float) -> Candidate:
        own, best = self.prefix_tokens[row], self.best_tokens
        prefill_s = self.prefill_s(best) / self.pace[row]
        transfer_s = max(0.0, seconds - prefill_s)
        name = self.prefillers[row].id
        return Candidate(name, self.wait_s[row], transfer_s, prefill_s, best, best - own, self.source)


DecodeRuleOfFew = Callable[[FewView, Candidate | None, int], DecodeChoice]


def least_tbt_of_few(view: FewView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    return _least_tbt(view, prefill, kv_tokens, [_now(view.fleet, known) for known in view.decoders])


def least_expected_tbt_of_few(view: FewView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    if prefill is None:
        return least_tbt_of_few(view, prefill, kv_tokens)
    in_s = prefill.ttft_s
    batches = [expected_batch(view.fleet, known, in_s) for known in view.decoders]
    is_shown = _row_of(view, prefill) is not None and view.transfer_s(view.num_prompt_tokens) > prefill.prefill_s
    only = [] if is_shown else [row for row, known in enumerate(view.decoders) if not known.can_prefill]
    if only and len(only) < len(batches):
        rooms = [(tbt_s, row) for row in only if (tbt_s := _with_room_s(view, row, batches[row], kv_tokens)) is not None]
        if rooms:
            row = min(rooms)[1]
            return _choice(view, view.decoders[row], batches[row], kv_tokens)
    return _least_tbt(view, prefill, kv_tokens, batches)


def _with_room_s(view: FewView, row: int, expected: Batch, kv_tokens: int) -> float | None:
    return roomy_tbt_s(view.costs, view.decoders[row], expected, view.num_prompt_tokens, kv_tokens, view.tbt_s)


def roomy_tbt_s(
    costs: QuickCosts, known: Instance, expected: Batch, num_prompt_tokens: int, kv_tokens: int, most_s: float
) -> float | None:
    """The step time with the request in it where that leaves a burst room, else None; `most_s` is the TBT objective."""
    batch, context_tokens, free = expected
    tbt_s = costs.decode_step_s(batch + 1, context_tokens + num_prompt_tokens)
    held = known.max_kv_tokens - free + kv_tokens
    has_room = batch + 1 <= FULL * known.max_batch and held <= FULL * known.max_kv_tokens and tbt_s <= FULL * most_s
    return tbt_s if has_room else None


def stay_of_few(view: FewView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    own = _row_of(view, prefill)
    if own is None:
        return least_tbt_of_few(view, prefill, kv_tokens)
    known = view.decoders[own]
    return _choice(view, known, _now(view.fleet, known), kv_tokens)


RULES_OF_FEW: dict[DecodeRule, DecodeRuleOfFew] = {
    least_tbt: least_tbt_of_few,
    least_expected_tbt: least_expected_tbt_of_few,
    stay: stay_of_few,
}
"""Decode rule → the same, number by number."""

Batch = tuple[int, int, int]
"""An instance's decode batch, its context tokens, and the KV tokens that are free."""


def _now(fleet: Fleet, known: Instance) -> Batch:
    return len(known.seats), known.context_tokens, fleet.free_kv_tokens(known)


def expected_batch(fleet: Fleet, known: Instance, in_s: float) -> Batch:
    """As DecodeColumns.expected has it."""
    stays_s = fleet.stays_s(known)
    stayed = max(0.0, 1.0 - in_s / stays_s)
    came = min(1.0, stays_s / in_s) if in_s > 0.0 else 1.0
    taken = known.taken
    reserved = fleet.reserved_kv_tokens(known)
    return (
        int(taken.batch * stayed + (len(known.seats) - taken.batch) * came),
        int(taken.context_tokens * stayed + (known.context_tokens - taken.context_tokens) * came),
        known.max_kv_tokens - int(taken.kv_tokens * stayed + (reserved - taken.kv_tokens) * came),
    )


def _least_tbt(view: FewView, prefill: Candidate | None, kv_tokens: int, batches: list[Batch]) -> DecodeChoice:
    own = _row_of(view, prefill)
    if own is not None and (choice := _choice(view, view.decoders[own], batches[own], kv_tokens)).fits:
        return choice
    step_s, prompt = view.costs.decode_step_s, view.num_prompt_tokens
    best, least_s = 0, float("inf")
    for row, (batch, context_tokens, free) in enumerate(batches):
        tbt_s = step_s(batch + 1, context_tokens + prompt)
        if batch >= view.decoders[row].max_batch or kv_tokens > free:
            tbt_s += 1e6
        if tbt_s < least_s:
            best, least_s = row, tbt_s
    return _choice(view, view.decoders[best], batches[best], kv_tokens)


def _row_of(view: FewView, prefill: Candidate | None) -> int | None:
    if prefill is None:
        return None
    name = prefill.instance
    for row, known in enumerate(view.decoders):
        if known.id == name:
            return row
    return None


def _choice(view: FewView, known: Instance, expected: Batch, kv_tokens: int) -> DecodeChoice:
    return choice_of(view.costs, known, expected, view.num_prompt_tokens, kv_tokens)


def choice_of(costs: QuickCosts, known: Instance, expected: Batch, num_prompt_tokens: int, kv_tokens: int) -> DecodeChoice:
    """`known` is chosen, and its batch will be `expected`."""
    batch, max_batch = expected[0] + 1, known.max_batch
    context = expected[1] + num_prompt_tokens
    fits = batch <= max_batch and kv_tokens <= expected[2]
    ahead = 0 if fits else max(1, batch - max_batch)
    return DecodeChoice(known.id, costs.decode_step_s(batch, context), batch, context, fits, ahead)
