"""What a policy sees where instances are few: the same numbers as in view.py's columns, one by one.

An array operation on a dozen rows takes as long as on a hundred, and a decision makes some ninety of them. Policies that have
a `place_few` are asked that instead, and must choose the same. Of more than FEW instances they see those that can be best.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from mypy_extensions import mypyc_attr

from kvasir.core.commands import Candidate
from kvasir.costs.quick import QuickCosts
from kvasir.pool.match import PrefixMatch
from kvasir.scheduling.decode_choice import FULL, DecodeChoice, DecodeRule, least_expected_tbt, least_tbt, stay
from kvasir.scheduling.fleet import Fleet, shares_in
from kvasir.scheduling.instance import Instance
from kvasir.scheduling.policies.interface import PlacementOfFew
from kvasir.scheduling.view import by_node, staged

FEW = 128
"""Instances up to which numbers are used: as machine code they are faster up to some hundred and fifty, else up to sixty."""


NEVER_S: Final = math.inf

NOTHING: Final = PrefixMatch((), (), ())


@mypyc_attr(acyclic=True)
class Prefiller:
    """An instance that can prefill, the `row`th, for one prompt: free in `wait_s`, for a share `pace` of its time.

    `local_s` and `fetch_s` are as ClusterView has them, but a fetch that the policy would not do takes for ever. The faster of
    them gives `ttft_s`.
    """

    __slots__ = ("fetch_s", "instance", "local_s", "pace", "prefix_tokens", "row", "ttft_s", "wait_s")

    def __init__(self, row: int, instance: Instance):
        self.row = row
        self.instance = instance
        self.wait_s = 0.0
        self.pace = 1.0
        self.prefix_tokens = 0
        self.local_s = 0.0
        self.fetch_s = NEVER_S
        self.ttft_s = 0.0


class FewView:
    """The cluster as of the last look at it, for one prompt; all that is not said here is as in ClusterView.

    The rest of the prompt behind the longest prefix takes `rest_s` alone. `prefillers` are in order of their ids; in a
    view that is not whole, they are those of least `ttft_s`, as many as a decision records.
    """

    __slots__ = (
        "_behind_s",
        "_behind_tokens",
        "_fetches_behind",
        "_known",
        "_match",
        "_now",
        "_of_all",
        "_policy",
        "_rank",
        "best_tokens",
        "block_tokens",
        "chunk_tokens",
        "costs",
        "due_in_s",
        "fleet",
        "is_whole",
        "kv_bytes_per_token",
        "layerwise",
        "max_stages",
        "num_prompt_tokens",
        "prefillers",
        "rest_s",
        "source",
        "stages_on_one_node",
        "tbt_s",
    )

    def __init__(
        self,
        fleet: Fleet,
        *,
        tbt_s: float,
        costs: QuickCosts,
        kv_bytes_per_token: int,
        block_tokens: int,
        chunk_tokens: int | None,
        layerwise: bool,
        max_stages: int,
        stages_on_one_node: bool,
        policy: PlacementOfFew | None,
    ):
        self.fleet = fleet
        self._policy = policy
        self.costs = costs
        self.kv_bytes_per_token = kv_bytes_per_token
        self.chunk_tokens = chunk_tokens
        self.tbt_s = tbt_s
        self.layerwise = layerwise
        self.max_stages = max_stages
        self.stages_on_one_node = stages_on_one_node
        self.block_tokens = block_tokens
        self._known: list[Instance] | None = None  # whose `_of_all` are
        self._of_all: list[Prefiller] = []
        self.prefillers = self._of_all
        self.is_whole = True
        self.num_prompt_tokens = self.best_tokens = self._behind_tokens = 0
        self.rest_s = self._behind_s = self.due_in_s = self._now = self._rank = 0.0
        self._fetches_behind = False
        self.source: str | None = None
        self._match = NOTHING

    def look(self, match: PrefixMatch, *, num_prompt_tokens: int, now: float, rank: float, due_s: float) -> None:
        """See how things are now, for this prompt. Valid until the fleet changes."""
        fleet = self.fleet
        if self._known is not fleet.prefillers:
            self._known = fleet.prefillers
            self._of_all = [Prefiller(row, known) for row, known in enumerate(fleet.prefillers)]
        self.num_prompt_tokens = num_prompt_tokens
        self.best_tokens = match.best * self.block_tokens
        self.source = match.source
        self.due_in_s, self._now, self._rank = due_s - now, now, rank
        self.rest_s = self.prefill_s(self.best_tokens)
        self._behind_tokens, self._behind_s, self._fetches_behind = self.best_tokens, self.rest_s, False
        self.is_whole = len(self._of_all) <= FEW or rank < fleet.latest_rank
        if self.is_whole:
            self.prefillers = self._of_all
            for row, blocks in enumerate(fleet.blocks_at_prefillers(match)):
                self.look_at(row, blocks)
        else:
            self.prefillers = fleet.contenders.find(self, match, now)
            self._match = match

    def decoding(self) -> list[Prefiller]:
        """Of those that decode as well the ones of least `ttft_s`. Only in a view that is not whole."""
        return self.fleet.contenders.find_decoding(self, self._match, self._now)

    def narrow(self, prefillers: list[Prefiller]) -> None:
        """Only these count."""
        self.prefillers = prefillers

    def look_at(self, row: int, blocks: int) -> Prefiller:
        """At one, whose node has so many blocks of the prompt."""
        prefiller = self._of_all[row]
        book = prefiller.instance.book
        wait_s, pace, prefix_tokens = book.wait_s(self._now, self._rank), book.pace, blocks * self.block_tokens
        if prefix_tokens != self._behind_tokens:  # most have the same prefix as the one before
            self._behind_tokens, self._behind_s = prefix_tokens, self.prefill_s(prefix_tokens)
            self._fetches_behind = self.fetches(prefix_tokens)
        prefiller.wait_s, prefiller.pace, prefiller.prefix_tokens = wait_s, pace, prefix_tokens
        prefiller.local_s = seconds = self._behind_s / pace
        prefiller.fetch_s = NEVER_S
        if self._fetches_behind:
            transfer_s = self.transfer_s(self.best_tokens - prefix_tokens)
            if self.layerwise:
                transfer_s = transfer_s - wait_s - self.rest_s
                if transfer_s < 0.0:
                    transfer_s = 0.0
            prefiller.fetch_s = fetch_s = transfer_s + self.rest_s / pace
            if fetch_s < seconds:
                seconds = fetch_s
        prefiller.ttft_s = wait_s + seconds
        return prefiller

    def fetches(self, prefix_tokens: int) -> bool:
        """Whether the longest prefix may be fetched to where there are so many tokens of it."""
        best_tokens, policy = self.best_tokens, self._policy
        return best_tokens > prefix_tokens and policy is not None and policy.fetches(prefix_tokens, best_tokens)

    def teams(self) -> list[list[Prefiller]]:
        """As ClusterView.teams."""
        free_s: list[float] = []
        for known in self._of_all:
            book = known.instance.book
            known.wait_s, known.pace = book.wait_s(self._now, self._rank), book.pace
            free_s.append(NEVER_S if known.pace < 1.0 else known.wait_s)
        free_first = [self._of_all[row] for row in sorted(range(len(free_s)), key=free_s.__getitem__)]
        return by_node(free_first, lambda known: known.instance.node) if self.stages_on_one_node else [free_first]

    @property
    def num_prefillers(self) -> int:
        """Those left out count too."""
        return len(self._of_all)

    def prefill_s(self, cached_tokens: int) -> float:
        return self.costs.prompt_s(self.num_prompt_tokens, cached_tokens, self.chunk_tokens)

    def transfer_s(self, tokens: int) -> float:
        return self.costs.transfer_s(tokens * self.kv_bytes_per_token) if tokens > 0 else 0.0

    def local(self, row: int) -> Candidate:
        known = self.prefillers[row]
        return Candidate(known.instance.id, known.wait_s, 0.0, known.local_s, known.prefix_tokens)

    def fetch(self, row: int) -> Candidate:
        """Only where `fetch_s` is finite."""
        known, best = self.prefillers[row], self.best_tokens
        prefill_s = self.rest_s / known.pace
        transfer_s = max(0.0, known.fetch_s - prefill_s)
        fetch_tokens = best - known.prefix_tokens
        return Candidate(known.instance.id, known.wait_s, transfer_s, prefill_s, best, fetch_tokens, self.source)

    def faster(self, row: int) -> Candidate:
        """Of both."""
        known = self.prefillers[row]
        return self.fetch(row) if known.fetch_s < known.local_s else self.local(row)

    def pipeline(self, stages: list[Prefiller]) -> Candidate:
        group = tuple([stage.instance.id for stage in stages])
        wait_s, pace = max([stage.wait_s for stage in stages]), min([stage.pace for stage in stages])
        return staged(self, group, wait_s=wait_s, pace=pace)


@mypyc_attr(acyclic=True)
class Expected:
    """What an instance decodes at some time: its batch, the context tokens of that, and the KV tokens that are free then."""

    __slots__ = ("batch", "context_tokens", "free_kv_tokens", "instance")

    def __init__(self, instance: Instance, batch: int, context_tokens: int, free_kv_tokens: int):
        self.instance = instance
        self.batch = batch
        self.context_tokens = context_tokens
        self.free_kv_tokens = free_kv_tokens


DecodeRuleOfFew = Callable[[FewView, Candidate | None, int], DecodeChoice]


def least_tbt_of_few(view: FewView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    return _least_tbt(view, prefill, kv_tokens, [_now(view.fleet, known) for known in view.fleet.decoders])


def least_expected_tbt_of_few(view: FewView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    if prefill is None:
        return least_tbt_of_few(view, prefill, kv_tokens)
    in_s = prefill.ttft_s
    decodes = [expected_batch(view.fleet, known, in_s) for known in view.fleet.decoders]
    own = _own(view, prefill)
    if own is None or view.transfer_s(view.num_prompt_tokens) <= prefill.prefill_s:
        roomy = _only_decoding(view, kv_tokens, decodes)
        if roomy is not None:
            return _choice(view, roomy, kv_tokens)
    return _least_tbt(view, prefill, kv_tokens, decodes)


def _only_decoding(view: FewView, kv_tokens: int, decodes: list[Expected]) -> Expected | None:
    """The least step time with the request in it, among those that only decode and still have room for a burst.

    None where there are none, or all only decode.
    """
    best: Expected | None = None
    least_s, num_only = NEVER_S, 0
    for expected in decodes:
        if expected.instance.can_prefill:
            continue
        num_only += 1
        tbt_s = roomy_tbt_s(view.costs, expected, view.num_prompt_tokens, kv_tokens, view.tbt_s)
        if tbt_s < least_s:
            best, least_s = expected, tbt_s
    return best if num_only < len(decodes) else None


def roomy_tbt_s(costs: QuickCosts, expected: Expected, num_prompt_tokens: int, kv_tokens: int, most_s: float) -> float:
    """The step time with the request in it where that leaves a burst room, else infinite; `most_s` is the TBT objective."""
    known = expected.instance
    tbt_s = costs.decode_step_s(expected.batch + 1, expected.context_tokens + num_prompt_tokens)
    held = known.max_kv_tokens - expected.free_kv_tokens + kv_tokens
    has_room = expected.batch + 1 <= FULL * known.max_batch and held <= FULL * known.max_kv_tokens
    return tbt_s if has_room and tbt_s <= FULL * most_s else NEVER_S


def stay_of_few(view: FewView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    own = _own(view, prefill)
    if own is None:
        return least_tbt_of_few(view, prefill, kv_tokens)
    return _choice(view, _now(view.fleet, own), kv_tokens)


RULES_OF_FEW: dict[DecodeRule, DecodeRuleOfFew] = {
    least_tbt: least_tbt_of_few,
    least_expected_tbt: least_expected_tbt_of_few,
    stay: stay_of_few,
}
"""Decode rule → the same, number by number."""


def _now(fleet: Fleet, known: Instance) -> Expected:
    return Expected(known, len(known.seats), known.context_tokens, fleet.free_kv_tokens(known))


def expected_batch(fleet: Fleet, known: Instance, in_s: float) -> Expected:
    """As DecodeColumns.expected has it."""
    stayed, came = shares_in(in_s, fleet.stays_s(known))
    taken = known.taken
    reserved = fleet.reserved_kv_tokens(known)
    return Expected(
        known,
        int(taken.batch * stayed + (len(known.seats) - taken.batch) * came),
        int(taken.context_tokens * stayed + (known.context_tokens - taken.context_tokens) * came),
        known.max_kv_tokens - int(taken.kv_tokens * stayed + (reserved - taken.kv_tokens) * came),
    )


def _least_tbt(view: FewView, prefill: Candidate | None, kv_tokens: int, decodes: list[Expected]) -> DecodeChoice:
    own = _own(view, prefill)
    best, least_s = decodes[0], NEVER_S
    for expected in decodes:
        known = expected.instance
        is_full = expected.batch >= known.max_batch or kv_tokens > expected.free_kv_tokens
        if known is own and not is_full:
            return _choice(view, expected, kv_tokens)
        tbt_s = _tbt_s(view, expected)
        if is_full:
            tbt_s += 1e6
        if tbt_s < least_s:
            best, least_s = expected, tbt_s
    return _choice(view, best, kv_tokens)


def _own(view: FewView, prefill: Candidate | None) -> Instance | None:
    """The instance that prefills, if it decodes too."""
    if prefill is None:
        return None
    own = view.fleet[prefill.instance]
    return own if own.can_decode else None


def _tbt_s(view: FewView, expected: Expected) -> float:
    """With the request in the batch."""
    return view.costs.decode_step_s(expected.batch + 1, expected.context_tokens + view.num_prompt_tokens)


def _choice(view: FewView, expected: Expected, kv_tokens: int) -> DecodeChoice:
    return choice_of(view.costs, expected, view.num_prompt_tokens, kv_tokens)


def choice_of(costs: QuickCosts, expected: Expected, num_prompt_tokens: int, kv_tokens: int) -> DecodeChoice:
    """Its instance is chosen."""
    known = expected.instance
    batch, max_batch = expected.batch + 1, known.max_batch
    context = expected.context_tokens + num_prompt_tokens
    fits = batch <= max_batch and kv_tokens <= expected.free_kv_tokens
    ahead = 0 if fits else max(1, batch - max_batch)
    return DecodeChoice(known.id, costs.decode_step_s(batch, context), batch, context, fits, ahead)
