"""AIBrix's prefill/decode router: its default prefix-cache score, and its `conductor` score."""

from __future__ import annotations

from random import Random

import numpy as np

from kvasir.scheduling.policies.best import best_of
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.policies.load import in_flight
from kvasir.scheduling.view import ClusterView, Floats

MIN_SPREAD = 16
"""Loads further apart than this are uneven (AIBRIX_PREFILL_LOAD_IMBALANCE_MIN_SPREAD)."""

DEVIATIONS = 2.0
"""Busier than mean + so many standard deviations is passed over: as its Helm chart sets it; the code's own default is 1."""


class Aibrix:
    """If `max - min > 16` requests, the least loaded; else least `(100 - match%) * 0.1 + requests / most requests` of those
    with `requests <= mean + 2 sigma`.

    Adapted: matches are exact, not rounded to whole percents; pods are not grouped in rolesets.
    """

    name = "aibrix"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        load = in_flight(view.prefills)
        if np.ptp(load) > MIN_SPREAD:
            return best_of(load.astype(float), view.local, "least load, loads being uneven,")
        match = 100.0 * view.prefills.prefix_tokens / view.num_prompt_tokens
        scores = (100.0 - match) * 0.1 + load / max(1, load.max())
        scores[load > load.mean() + DEVIATIONS * load.std()] = np.inf
        return best_of(scores, view.local, "least score of match and load")


class AibrixConductor:
    """TTFT in ms: `requests * mean prefill + (0.005 * matched + 1) + (0.001 * unmatched^1.5 + 5)`, a term being 0 for 0 tokens.

    The coefficients are AIBrix's, for any model on any hardware. Adapted: it takes the mean prefill time from the engine's
    metrics; here it is the third term of the mean length in the queue.
    """

    name = "aibrix-conductor"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        prefills = view.prefills
        matched = prefills.prefix_tokens.astype(float)
        queue_ms = prefills.queued * _prefill_ms(prefills.queued_tokens / np.maximum(1, prefills.queued))
        prefix_ms = np.where(matched > 0.0, 0.005 * matched + 1.0, 0.0)
        ttft_ms = queue_ms + prefix_ms + _prefill_ms(view.num_prompt_tokens - matched)
        return best_of(ttft_ms, view.local, "least TTFT by AIBrix's coefficients")


def _prefill_ms(tokens: Floats) -> Floats:
    return np.where(tokens > 0.0, 0.001 * tokens**1.5 + 5.0, 0.0)
