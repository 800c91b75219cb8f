"""NVIDIA Dynamo's KV router: blocks to prefill, less what is cached, plus blocks that decode."""

from __future__ import annotations

from random import Random

import numpy as np

from kvasir.scheduling.policies.best import best_of
from kvasir.scheduling.policies.choice import Choice
from kvasir.scheduling.view import ClusterView, Floats, Ints

PREFILL_LOAD_SCALE = 1.0
HOST_CREDIT = 0.75
DISK_CREDIT = 0.25
"""Dynamo's defaults: router-prefill-load-scale, router-host-cache-hit-weight, router-disk-cache-hit-weight."""


class Dynamo:
    """`scale * max(active_prefill + incoming - credits, 0) + decode_blocks`, in blocks; temperature 0, no credit decay.

    A cached block counts 0.75, Dynamo's credit for host memory, or 0.25 on SSD: the pool is its node's DRAM, from which an
    instance must load what it uses. (Of blocks in GPU memory, which would count 1, the conductor is not told.) What
    is on SSD is loaded, as Dynamo's block manager does; nothing is fetched from other nodes. Decode blocks are those of
    instances that decode as well: Dynamo's prefill router does not count any.
    """

    name = "dynamo"

    def place(self, view: ClusterView, rng: Random) -> Choice:
        prefills = view.prefills
        loads = np.isfinite(view.load_s)
        on_disk = np.where(loads, prefills.deep_tokens - prefills.prefix_tokens, 0)
        credit = HOST_CREDIT * prefills.prefix_tokens + DISK_CREDIT * on_disk
        prefill_tokens = np.maximum(prefills.queued_tokens + view.num_prompt_tokens - credit, 0.0)
        blocks: Floats = (PREFILL_LOAD_SCALE * prefill_tokens + _decode_tokens(view)) / view.block_tokens
        return best_of(blocks, lambda row: view.load(row) if loads[row] else view.local(row), "least blocks of work")


def _decode_tokens(view: ClusterView) -> Ints:
    """Context tokens that the prefill instances decode themselves."""
    if not view.prefills.batch.any():
        return np.zeros(len(view.prefills), dtype=np.int64)
    tokens = dict(zip(view.decodes.ids, view.decodes.context_tokens.tolist(), strict=True))
    return np.array([tokens.get(name, 0) for name in view.prefills.ids], dtype=np.int64)
