"""What a policy sees: the cluster at one moment, for one prompt, in columns. Read only."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from msgspec import Struct, field
from msgspec.structs import replace

from kvasir.core.commands import Candidate
from kvasir.costs.quick import QuickCosts

if TYPE_CHECKING:
    from kvasir.scheduling.few import FewView

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class PrefillColumns(Struct, frozen=True):
    """The instances that can prefill, sorted by id, one row each.

    `wait_s`: predicted seconds until it gets to this prompt. `pace`: seconds of prefill that it does in a second, below 1
    where it decodes beside. `prefix_tokens`: of this prompt, cached in DRAM on its node; `deep_tokens`: in DRAM or on SSD.
    `queued` prefills of `queued_tokens` new tokens were sent and are not done. `batch` requests decode there or will,
    `kv_used` of its KV memory is spoken for (0 to 1). `can_decode`: what it prefills may stay there.
    """

    ids: tuple[str, ...]
    wait_s: Floats
    pace: Floats
    prefix_tokens: Ints
    deep_tokens: Ints
    queued: Ints
    queued_tokens: Ints
    batch: Ints
    kv_used: Floats
    can_decode: Bools

    def __len__(self) -> int:
        return len(self.ids)


class DecodeColumns(Struct, frozen=True):
    """The instances that can decode, sorted by id: what each was given already, those still in prefill included.

    Of these, `taken_batch` with `taken_context` and `taken_kv` tokens decode now. An answer stays `stays_s` there.
    `can_prefill`: it may also do that.
    """

    ids: tuple[str, ...]
    batch: Ints
    context_tokens: Ints
    free_kv_tokens: Ints
    max_batch: Ints
    taken_batch: Ints
    taken_context: Ints
    kv_tokens: Ints
    taken_kv: Ints
    can_prefill: Bools
    stays_s: Floats

    def expected(self, in_s: float) -> DecodeColumns:
        """The batches in so many seconds, if those that decode now leave evenly and those in prefill come evenly till then.

        Of those that come, who came more than `stays_s` before has left again.
        """
        stayed = np.maximum(0.0, 1.0 - in_s / self.stays_s)
        came = np.minimum(1.0, self.stays_s / in_s) if in_s > 0.0 else np.ones(len(self))
        assigned_kv = self.kv_tokens - self.free_kv_tokens
        return replace(
            self,
            batch=_mixed(self.taken_batch, self.batch, stayed, came),
            context_tokens=_mixed(self.taken_context, self.context_tokens, stayed, came),
            free_kv_tokens=self.kv_tokens - _mixed(self.taken_kv, assigned_kv, stayed, came),
        )

    def __len__(self) -> int:
        return len(self.ids)


class ClusterView(Struct, frozen=True, dict=True):
    """`best_tokens` is the longest prefix that any node holds in DRAM, on `source`; the first token is due in `due_in_s`,
    others each `tbt_s`.

    Prefill runs in steps of `chunk_tokens`, a pipeline in at most `max_stages` stages. With `layerwise`, transfers overlap
    waiting and compute layer by layer.
    """

    prefills: PrefillColumns
    decodes: DecodeColumns
    num_prompt_tokens: int
    best_tokens: int
    source: str | None
    costs: QuickCosts
    kv_bytes_per_token: int
    block_tokens: int = 1
    due_in_s: float = math.inf
    tbt_s: float = math.inf
    chunk_tokens: int | None = None
    load_bandwidth: float = 0.0
    layerwise: bool = False
    max_stages: int = 1
    _prefill_s: dict[int, float] = field(default_factory=dict)

    def prefill_s(self, cached_tokens: int) -> float:
        """Computing the rest of the prompt on an instance that does nothing else, in its steps."""
        known = self._prefill_s.get(cached_tokens)
        if known is None:
            known = self.costs.prompt_s(self.num_prompt_tokens, cached_tokens, self.chunk_tokens)
            self._prefill_s[cached_tokens] = known
        return known

    @cached_property
    def local_s(self) -> Floats:
        """Per instance: prefill from the prefix that its node holds in DRAM."""
        return _by_value(self.prefill_s, self.prefills.prefix_tokens) / self.prefills.pace

    @cached_property
    def fetch_s(self) -> Floats:
        """Per instance: bring the longest prefix there, then prefill the rest; infinite where it is there already."""
        if self.source is None:
            return np.full(len(self.prefills), math.inf)
        rest_s = self.prefill_s(self.best_tokens)
        transfer_s = _by_value(self.transfer_s, self.best_tokens - self.prefills.prefix_tokens)
        seconds = self.exposed_s(transfer_s, rest_s) + rest_s / self.prefills.pace
        return np.where(transfer_s > 0.0, seconds, math.inf)

    @cached_property
    def load_s(self) -> Floats:
        """Per instance: read from the node's SSD what is cached there beyond DRAM, prefill the rest; else infinite."""
        prefills = self.prefills
        if not self.load_bandwidth or not (prefills.deep_tokens > prefills.prefix_tokens).any():
            return np.full(len(prefills), math.inf)
        num_bytes = (prefills.deep_tokens - prefills.prefix_tokens) * float(self.kv_bytes_per_token)
        read_s: Floats = np.true_divide(num_bytes, self.load_bandwidth)
        rest_s = _by_value(self.prefill_s, prefills.deep_tokens) / prefills.pace
        return np.where(read_s > 0.0, self.exposed_s(read_s, rest_s) + rest_s, math.inf)

    @cached_property
    def own_s(self) -> Floats:
        """Per instance: prefill from what its own node holds, in DRAM or on SSD, whichever is faster."""
        return np.minimum(self.local_s, self.load_s)

    def transfer_s(self, tokens: int) -> float:
        """Moving the KV of so many tokens from one node to another."""
        return self.costs.transfer_s(tokens * self.kv_bytes_per_token) if tokens > 0 else 0.0

    def exposed_s(self, transfer_s: Floats, prefill_s: Floats | float) -> Floats:
        """What of a transfer neither waiting in the queue nor computing layer by layer hides."""
        if not self.layerwise:
            return transfer_s
        return np.maximum(0.0, transfer_s - self.prefills.wait_s - prefill_s)

    def local(self, row: int) -> Candidate:
        """Use what the node holds in DRAM, compute the rest."""
        return self._candidate(row, int(self.prefills.prefix_tokens[row]), float(self.local_s[row]))

    def own(self, row: int) -> Candidate:
        """The plan behind `own_s`."""
        return self.load(row) if self.load_s[row] < self.local_s[row] else self.local(row)

    def fetch(self, row: int) -> Candidate:
        """Bring the longest prefix to the node, compute the rest. Only where `fetch_s` is finite."""
        own, best = int(self.prefills.prefix_tokens[row]), self.best_tokens
        return self._candidate(row, best, float(self.fetch_s[row]), fetch_tokens=best - own, source=self.source)

    def load(self, row: int) -> Candidate:
        """Read what the node has on SSD, compute the rest. Only where `load_s` is finite."""
        own, deep = int(self.prefills.prefix_tokens[row]), int(self.prefills.deep_tokens[row])
        return self._candidate(row, deep, float(self.load_s[row]), load_tokens=deep - own)

    def pipeline(self, rows: list[int]) -> Candidate:
        """The prompt in as many stages as `rows`, in that order, from the longest prefix that any node holds.

        Each stage computes its share of the layers of one chunk after another; the last finishes when it has done all of
        its own and, before, every stage ahead of it the first chunk: n + stages - 1 turns for n chunks (FAST'25, 3.3). Each
        stage needs its layers of the prefix only, so that together they fetch it once.
        """
        prefills = self.prefills
        group = tuple(prefills.ids[row] for row in rows)
        return staged(self, group, wait_s=float(prefills.wait_s[rows].max()), pace=float(prefills.pace[rows].min()))

    def _candidate(
        self, row: int, prefix: int, seconds: float, *, fetch_tokens: int = 0, load_tokens: int = 0, source: str | None = None
    ) -> Candidate:
        prefills = self.prefills
        prefill_s = self.prefill_s(prefix) / float(prefills.pace[row])
        wait_s = float(prefills.wait_s[row])
        return Candidate(
            prefills.ids[row], wait_s, max(0.0, seconds - prefill_s), prefill_s, prefix, fetch_tokens, source, load_tokens
        )


def staged(view: ClusterView | FewView, group: tuple[str, ...], *, wait_s: float, pace: float) -> Candidate:
    """A pipeline of these stages, which are free in `wait_s` and as fast as the slowest of them."""
    cached = view.best_tokens
    new_tokens = view.num_prompt_tokens - cached
    num_chunks = -(-new_tokens // (view.chunk_tokens or new_tokens))
    turns = 1.0 + (len(group) - 1) / num_chunks
    prefill_s = view.prefill_s(cached) / len(group) * turns / pace
    transfer_s = view.transfer_s(cached)
    if view.layerwise:
        transfer_s = max(0.0, transfer_s - wait_s - prefill_s)
    source = view.source if cached else None
    return Candidate(group[-1], wait_s, transfer_s, prefill_s, cached, cached, source, group=group)


def _mixed(taken: Ints, assigned: Ints, stayed: Floats, came: Floats) -> Ints:
    return (taken * stayed + (assigned - taken) * came).astype(np.int64)


def _by_value(seconds: Callable[[int], float], tokens: Ints) -> Floats:
    """`seconds` of each row; prefixes are few, so each is asked for once, and its rows are written together."""
    by_row: Floats = np.empty(len(tokens))
    for value in set(tokens.tolist()):
        by_row[tokens == value] = seconds(value)
    return by_row
