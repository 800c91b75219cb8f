"""Ours: the fastest of all plans in predicted seconds, and a pipeline of several instances where one cannot be in time."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from kvasir.core.commands import Candidate
from kvasir.scheduling.policies.best import choice_of, least_of_few, least_rows
from kvasir.scheduling.policies.choice import NUM_RECORDED, Choice
from kvasir.scheduling.view import ClusterView, Floats

if TYPE_CHECKING:
    from kvasir.scheduling.few import FewView

T = TypeVar("T")

MARGIN: Final = 0.9
"""A plan is in time when it is predicted to need at most this share of what is left until the first token is due."""

IDLE: Final = 0.1
"""A pipeline starts only where its stages are free within this share of the time that is left. It serves the prompts that cost
most per token: while others queue, those would pay for it."""

SLACK_HORIZON_S: Final = 4.0
"""An instance that decodes takes prefill only if it is predicted to be done so soon: its slack will not stay what it is."""

SMOOTH: Final = 0.15
"""Where a hand-off would take longer than the prefill that hides it by more than this share of the TBT objective (a prompt
that is nearly all cached), the request is prefilled where it will decode: its KV arrives before the first token, not after."""

WHY: Final = "least TTFT of all plans"


class Kvasir:
    """Each instance by its fastest plan: compute from its own prefix, fetch the longest, or load its own from SSD.

    There is no threshold: what is faster is done, and since a fetch leaves a copy, prefixes spread as far as they are
    worth the transfer. A prompt that is late on every single instance runs as a chunked pipeline (FAST'25, section 3.3) over
    the fewest instances with which it is in time, those that are free first.
    """

    name = "kvasir"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        local_s, fetch_s, load_s = view.local_s, view.fetch_s, view.load_s
        ttft_s = np.minimum(local_s, fetch_s)
        np.minimum(ttft_s, load_s, out=ttft_s)
        ttft_s += view.prefills.wait_s

        def plan(row: int) -> Candidate:
            if load_s[row] < local_s[row] and load_s[row] < fetch_s[row]:
                return view.load(row)
            return view.fetch(row) if fetch_s[row] < local_s[row] else view.local(row)

        alone = choice_of(_best_rows(view, ttft_s), plan, f"{WHY} among {len(ttft_s)}")
        if view.max_stages == 1 or alone.ttft_s <= MARGIN * view.due_in_s:
            return alone
        return _pipeline(view, alone, [(len(team), _first_of(view.pipeline, team)) for team in view.teams()])

    def place_few(self, view: FewView) -> Choice | None:
        """As `place`."""
        if not view.is_whole and not _sees_all_that_are_wanted(view):
            return None
        ttft_s = [known.ttft_s for known in view.prefillers]
        if view.is_whole:
            ttft_s = _where_wanted_of_few(view, ttft_s)
        alone = choice_of(least_of_few(ttft_s), view.faster, f"{WHY} among {view.num_prefillers}")
        if view.max_stages == 1 or alone.ttft_s <= MARGIN * view.due_in_s:
            return alone
        return _pipeline(view, alone, [(len(team), _first_of(view.pipeline, team)) for team in view.teams()])

    def fetches(self, prefix_tokens: int, best_tokens: int) -> bool:
        return True


Team = tuple[int, Callable[[int], Candidate]]
"""How many may be stages of one pipeline, and the pipeline of the first so many of them."""


def _first_of(pipeline: Callable[[list[T]], Candidate], team: list[T]) -> Callable[[int], Candidate]:
    return lambda count: pipeline(team[:count])


def _pipeline(view: ClusterView | FewView, alone: Choice, teams: list[Team]) -> Choice:
    """The fastest pipeline of any team, where that is faster than one alone."""
    best, most = alone.chosen, 0
    for size, pipeline in teams:
        candidate = _in_stages(view, alone.chosen, size, pipeline)
        if candidate.ttft_s < best.ttft_s:
            best, most = candidate, size
    if best is alone.chosen:
        return alone
    why = f"pipeline of {len(best.group)} stages, being late alone, among {most}"
    return Choice((best, *alone.candidates[:2]), why)


def _in_stages(view: ClusterView | FewView, best: Candidate, most: int, pipeline: Callable[[int], Candidate]) -> Candidate:
    """Twice as many stages until it is in time or does not get faster. A stage that decodes beside would slow all down."""
    num_stages = 2
    while num_stages <= min(view.max_stages, most):
        candidate = pipeline(num_stages)
        if candidate.ttft_s >= best.ttft_s or candidate.wait_s > IDLE * view.due_in_s:
            break
        best = candidate
        if best.ttft_s <= MARGIN * view.due_in_s:
            break
        num_stages *= 2
    return best


def _where_wanted_of_few(view: FewView, ttft_s: list[float]) -> list[float]:
    """As `_where_wanted`."""
    known = view.prefillers
    if any(known[row].pace < 1.0 and s > SLACK_HORIZON_S for row, s in enumerate(ttft_s)):
        ttft_s = _only([known[row].pace == 1.0 or s <= SLACK_HORIZON_S for row, s in enumerate(ttft_s)], ttft_s)
    if _shows(view, view.rest_s):
        limit_s = MARGIN * view.due_in_s
        ttft_s = _only([known[row].instance.can_decode and s <= limit_s for row, s in enumerate(ttft_s)], ttft_s)
    return ttft_s


def _only(is_wanted: list[bool], seconds: list[float]) -> list[float]:
    """Infinite for those that are not, unless nobody is."""
    if True not in is_wanted or False not in is_wanted:
        return seconds
    return [seconds[row] if wanted else math.inf for row, wanted in enumerate(is_wanted)]


def _best_rows(view: ClusterView, ttft_s: Floats) -> list[int]:
    """Those to record, where they are wanted. Mostly the best of all are: then nobody else needs a look."""
    rows, pace = least_rows(ttft_s), view.prefills.pace
    is_steady = [pace[row] == 1.0 or ttft_s[row] <= SLACK_HORIZON_S for row in rows]
    if all(is_steady) and not _shows(view, view.prefill_s(view.best_tokens)):
        return rows
    return least_rows(_where_wanted(view, ttft_s))


def _where_wanted(view: ClusterView, ttft_s: Floats) -> Floats:
    """Infinite for instances that should not prefill this prompt, as long as there are others."""
    prefills = view.prefills
    is_steady = (prefills.pace == 1.0) | (ttft_s <= SLACK_HORIZON_S)
    if is_steady.any():
        ttft_s = np.where(is_steady, ttft_s, np.inf)
    if _shows(view, view.prefill_s(view.best_tokens)):
        stays = prefills.can_decode & (ttft_s <= MARGIN * view.due_in_s)
        if stays.any():
            ttft_s = np.where(stays, ttft_s, np.inf)
    return ttft_s


def _sees_all_that_are_wanted(view: FewView) -> bool:
    """For a view of the best only: whether they are the best of those that should prefill the prompt, too. If these are those
    that decode as well, the view is narrowed to them.
    """
    if _shows(view, view.rest_s):
        in_time = [known for known in view.decoding() if known.ttft_s <= MARGIN * view.due_in_s]
        if in_time and len(in_time) < NUM_RECORDED:
            return False
        if in_time:
            view.narrow(in_time)
    return not any(known.pace < 1.0 and known.ttft_s > SLACK_HORIZON_S for known in view.prefillers)


def _shows(view: ClusterView | FewView, rest_s: float) -> bool:
    """Whether the hand-off to another instance would take so much longer than the prefill that hides it."""
    return view.transfer_s(view.num_prompt_tokens) - rest_s > SMOOTH * view.tbt_s
