"""Among many instances, those that can be the best for a prompt: found by groups, of which most need no look inside.

Nobody in a group has the prompt done before one would who had the group's longest prefix of it, were free when its first is,
and as fast as its fastest. Where that is later than those found already, the group has no better.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from mypy_extensions import mypyc_attr

from kvasir.core.errors import InvariantError
from kvasir.pool.match import PrefixMatch, bits_of
from kvasir.scheduling.instance import Instance
from kvasir.scheduling.policies.choice import NUM_RECORDED

if TYPE_CHECKING:
    from kvasir.scheduling.few import FewView, Prefiller

GROUP: Final = 16
"""Instances of a group: of a thousand there are some sixty, of which one or two are looked into."""

EVERYBODY: Final = (1 << GROUP) - 1
"""In a group, as bits."""

MANY: Final = 64
"""Nodes that have a prefix: from so many on, who else has it is found from there."""

MOST_KNOWN: Final = 256
"""Prefixes of which it is remembered who has them; to find it again takes as long as placing a prompt."""

ROUNDING_S: Final = 1e-6
"""What a bound, in which absolute times are subtracted, may be wrong by."""


class Group:
    """Some instances by row, and what none of them is below: free at a time, after a wait, slowness (seconds for one of
    prefill). `bound_s` is the TTFT that none of them is below for the prompt that was last asked for.
    """

    __slots__ = ("bound_s", "free_s", "is_stale", "least_wait_s", "members", "number", "rows", "slowness")

    def __init__(self, number: int, rows: list[int], members: list[Instance]):
        self.number = number
        self.rows = rows
        self.members = members
        self.is_stale = True
        self.free_s = self.least_wait_s = math.inf
        self.slowness = self.bound_s = math.inf

    def refresh(self) -> None:
        free_s = least_wait_s = math.inf
        most_pace = 0.0
        for known in self.members:
            book = known.book
            own_free_s, own_wait_s, pace = book.free_s, book.least_wait_s, book.pace
            if own_free_s < free_s:
                free_s = own_free_s
            if own_wait_s < least_wait_s:
                least_wait_s = own_wait_s
            if pace > most_pace:
                most_pace = pace
        self.free_s, self.least_wait_s, self.slowness = free_s, least_wait_s, 1.0 / most_pace
        self.is_stale = False


@mypyc_attr(acyclic=True)
class Prefix:
    """A prefix that some nodes have: computing the rest takes `local_s` alone. A fetch, by whoever has no longer one, does not
    let the prefill behind it begin before `fetched_s`. `holders` are, by group, those who have it, as bits by place.
    """

    __slots__ = ("blocks", "fetched_s", "holders", "local_s")

    def __init__(self, holders: list[int], blocks: int, local_s: float, fetched_s: float):
        self.holders = holders
        self.blocks = blocks
        self.local_s = local_s
        self.fetched_s = fetched_s


class HoldersByGroup:
    """Who has a prefix, by groups: a match says it of nodes, as bits of one number of a thousand bits."""

    __slots__ = ("_groups", "_known", "_latest", "_latest_mask", "_nodes", "_places")

    def __init__(self, groups: list[Group]):
        self._groups = groups
        self._nodes: tuple[str | None, ...] | None = None  # by whose bits `_places` are
        self._places: list[list[tuple[int, int]]] = []  # (group, bit) of the instances on each node
        self._known: dict[int, list[int]] = {}  # by mask: some prefixes are many prompts'
        self._latest_mask = 0  # of very many nodes
        self._latest = [0] * len(groups)

    def see(self, match: PrefixMatch) -> None:
        """Ask for its masks from now on; its `nodes` change only as a whole."""
        if match.nodes is self._nodes:
            return
        self._nodes = match.nodes
        places = [(group.number, 1 << place) for group in self._groups for place in range(len(group.members))]
        rows_on = match.rows_on([known.node for group in self._groups for known in group.members])
        self._places = [[places[row] for row in rows] for rows in rows_on]
        self._known = {}
        self._latest_mask, self._latest = 0, [0] * len(self._groups)

    def of(self, mask: int) -> list[int]:
        """By group, the bits of those on these nodes; to be read only."""
        holders = self._known.get(mask)
        if holders is None:
            holders = self._spread(mask)
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[mask] = holders
        return holders

    def _spread(self, mask: int) -> list[int]:
        """From nothing, or from the latest that many nodes had: one that is everybody's comes to one node more at a time."""
        changed = mask ^ self._latest_mask
        if changed.bit_count() < mask.bit_count():
            holders = self._latest.copy()
        else:
            changed, holders = mask, [0] * len(self._groups)
        for node in bits_of(changed):
            for number, bit in self._places[node]:
                holders[number] ^= bit
        if mask.bit_count() >= MANY:
            self._latest_mask, self._latest = mask, holders
        return holders


class Contenders:
    """All instances that can prefill, in groups of those that decode as well and those that do not."""

    __slots__ = ("_decoding", "_group_of", "_groups", "_holders")

    def __init__(self, prefillers: list[Instance]):
        decoding = [row for row, known in enumerate(prefillers) if known.can_decode]
        others = [row for row, known in enumerate(prefillers) if not known.can_decode]
        parts = _parts(others)
        num_others = len(parts)
        parts += _parts(decoding)
        self._groups = [Group(number, part, [prefillers[row] for row in part]) for number, part in enumerate(parts)]
        self._decoding = self._groups[num_others:]
        self._group_of = {known.id: group for group in self._groups for known in group.members}
        self._holders = HoldersByGroup(self._groups)

    def booked(self, known: Instance) -> None:
        """Its queue or its pace has changed."""
        group = self._group_of.get(known.id)
        if group is not None:
            group.is_stale = True

    def find(self, view: FewView, match: PrefixMatch, now: float) -> list[Prefiller]:
        """The NUM_RECORDED that `view` has the least TTFT for, or others as good to rounding, in order of their rows.

        The prompt of `view` must go last in every queue.
        """
        return self._find(self._groups, view, match, now)

    def find_decoding(self, view: FewView, match: PrefixMatch, now: float) -> list[Prefiller]:
        """As `find`, of those that decode as well."""
        return self._find(self._decoding, view, match, now)

    def _find(self, groups: list[Group], view: FewView, match: PrefixMatch, now: float) -> list[Prefiller]:
        if not groups:
            return []
        self._holders.see(match)
        prefixes = self._prefixes(view, match)
        nearest, least_s = groups[0], math.inf
        for group in groups:
            _bind(group, view, prefixes, now)
            if group.bound_s < least_s:
                nearest, least_s = group, group.bound_s
        best: list[Prefiller] = []
        _look_into(nearest, best, view, prefixes, now)
        for group in groups:
            if group is not nearest and _can_be_better(group.rows[0], group.bound_s, best):
                _look_into(group, best, view, prefixes, now)
        best.sort(key=_row)
        return best

    def check(self) -> None:
        """Raises InvariantError if a group that is not stale says what its members do not."""
        for group in self._groups:
            if not group.is_stale:
                said = group.free_s, group.least_wait_s, group.slowness
                group.refresh()
                if said != (group.free_s, group.least_wait_s, group.slowness):
                    raise InvariantError(f"the group of {group.members[0].id} says {said}, its members disagree")

    def _prefixes(self, view: FewView, match: PrefixMatch) -> list[Prefix]:
        """The longest first; the last is none."""
        prefixes: list[Prefix] = []
        fetched_s = math.inf
        for mask, blocks in ((0, 0), *match.runs):
            tokens = blocks * view.block_tokens
            if view.fetches(tokens):
                transfer_s = view.transfer_s(view.best_tokens - tokens)
                # waiting and the prefill itself hide it
                fetched_s = min(fetched_s, transfer_s - view.rest_s if view.layerwise else 0.0)
            prefixes.append(Prefix(self._holders.of(mask), blocks, view.prefill_s(tokens), fetched_s))
        prefixes.reverse()
        return prefixes


def _parts(rows: list[int]) -> list[list[int]]:
    return [rows[start : start + GROUP] for start in range(0, len(rows), GROUP)]


def _longest(prefixes: list[Prefix], group: int, members: int) -> Prefix:
    """Of those that one of these members has; everybody has none."""
    for prefix in prefixes:
        if prefix.holders[group] & members:
            return prefix
    return prefixes[-1]


def _bind(group: Group, view: FewView, prefixes: list[Prefix], now: float) -> None:
    """Set its `bound_s`."""
    if group.is_stale:
        group.refresh()
    longest = _longest(prefixes, group.number, EVERYBODY)
    group.bound_s = _bound_s(view, longest, group.free_s - now, group.least_wait_s, group.slowness)


def _bound_s(view: FewView, longest: Prefix, free_in_s: float, least_wait_s: float, slowness: float) -> float:
    """The least TTFT of one with this prefix who is free so soon and after no less than a wait, so much slower than alone.

    Comparisons are written out, since `min` and `max` of floats are calls in machine code.
    """
    wait_s = free_in_s
    if wait_s < least_wait_s:
        wait_s = least_wait_s
    computed_s = wait_s + longest.local_s * slowness
    if wait_s < longest.fetched_s:
        wait_s = longest.fetched_s
    fetched_s = wait_s + view.rest_s * slowness
    if fetched_s < computed_s:
        computed_s = fetched_s
    return computed_s


def _can_be_better(row: int, bound_s: float, best: list[Prefiller]) -> bool:
    """Who is not below this bound, at this row or behind it."""
    if len(best) < NUM_RECORDED:
        return True
    last = best[-1]
    if bound_s == last.ttft_s:  # as where many are idle: the first row goes first
        return row < last.row
    return bound_s < last.ttft_s + ROUNDING_S


def _look_into(group: Group, best: list[Prefiller], view: FewView, prefixes: list[Prefix], now: float) -> None:
    """Have those of the group among `best` that belong there."""
    rows, number, bit = group.rows, group.number, 1
    for place, known in enumerate(group.members):
        row, longest, book = rows[place], _longest(prefixes, number, bit), known.book
        bit *= 2
        free_in_s, least_wait_s, pace = book.free_s - now, book.least_wait_s, book.pace
        bound_s = _bound_s(view, longest, free_in_s, least_wait_s, 1.0 / pace)
        if free_in_s > least_wait_s or pace < 1.0:
            bound_s -= ROUNDING_S  # equal numbers say nothing then
        if _can_be_better(row, bound_s, best):
            _put(best, view.look_at(row, longest.blocks))


def _put(best: list[Prefiller], known: Prefiller) -> None:
    """In order of TTFT, of equals in order of rows, NUM_RECORDED at most."""
    place, ttft_s = len(best), known.ttft_s
    while place:
        other = best[place - 1]
        if other.ttft_s < ttft_s or (other.ttft_s == ttft_s and other.row < known.row):
            break
        place -= 1
    best.insert(place, known)
    if len(best) > NUM_RECORDED:
        best.pop()


def _row(known: Prefiller) -> int:
    return known.row
