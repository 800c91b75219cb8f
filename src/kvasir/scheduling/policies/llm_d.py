"""llm-d's default scorers: short queue, free KV memory, long prefix, each from 0 to 1 and weighted."""

from __future__ import annotations

from random import Random

import numpy as np

from kvasir.scheduling.policies.best import best_of
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.view import ClusterView, Floats, Ints

QUEUE_WEIGHT = 2.0
KV_WEIGHT = 2.0
PREFIX_WEIGHT = 3.0
"""The default profile of llm-d's router: queue-scorer, kv-cache-utilization-scorer, prefix-cache-scorer."""


class LlmD:
    """`2 * (max - queue) / (max - min) + 2 * (1 - KV used) + 3 * cached / prompt`, the highest wins.

    Equal queues all score 1. Adapted: llm-d reads the engine's waiting queue, without the prompts that it computes right now;
    here these count too. Its index is of prefix hashes per instance, here of nodes' DRAM.
    """

    name = "llm-d"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        prefills = view.prefills
        cached = prefills.prefix_tokens / view.num_prompt_tokens
        scores = QUEUE_WEIGHT * shortness(prefills.queued) + KV_WEIGHT * (1.0 - prefills.kv_used) + PREFIX_WEIGHT * cached
        return best_of(-scores, view.local, "highest score of queue, KV and prefix")


def shortness(queues: Ints) -> Floats:
    """1 for the shortest queue, 0 for the longest, 1 for all if they are equal."""
    longest, shortest = queues.max(), queues.min()
    if longest == shortest:
        return np.ones(len(queues))
    scores: Floats = np.true_divide(longest - queues, longest - shortest)
    return scores
