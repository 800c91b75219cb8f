"""What a policy sees: the cluster at one moment, for one prompt. Read only."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

from kvasir.core.commands import Candidate
from kvasir.costs.model import CostModel


class PrefillView(Struct, frozen=True, gc=False):
    """An instance that can prefill: predicted seconds until its queue is done, and the prefix that its node holds."""

    id: str
    node: str
    wait_s: float
    prefix_tokens: int


class DecodeView(Struct, frozen=True, gc=False):
    """An instance that can decode: what it was given already, those still in prefill included."""

    id: str
    node: str
    batch: int
    context_tokens: int
    free_kv_tokens: int
    max_batch: int


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Both lists are sorted by id. `best_tokens` is the longest prefix that any node holds, on `source`."""

    prefills: tuple[PrefillView, ...]
    decodes: tuple[DecodeView, ...]
    num_prompt_tokens: int
    best_tokens: int
    source: str | None
    costs: CostModel
    kv_bytes_per_token: int

    def local(self, instance: PrefillView) -> Candidate:
        """Use what the node holds, compute the rest."""
        cached = instance.prefix_tokens
        prefill_s = self.costs.prefill_s(self.num_prompt_tokens - cached, cached)
        return Candidate(instance.id, instance.wait_s, 0.0, prefill_s, cached)

    def fetch(self, instance: PrefillView) -> Candidate | None:
        """Bring the longest prefix to the node, compute the rest; None when it is there already."""
        best, fetched = self.best_tokens, self.best_tokens - instance.prefix_tokens
        if fetched <= 0 or self.source is None or self.source == instance.node:
            return None
        transfer_s = self.costs.transfer_s(fetched * self.kv_bytes_per_token)
        prefill_s = self.costs.prefill_s(self.num_prompt_tokens - best, best)
        return Candidate(instance.id, instance.wait_s, transfer_s, prefill_s, best, fetched, self.source)
