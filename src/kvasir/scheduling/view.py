"""What policies and rules see: the cluster at one moment, for one prompt, in columns. Read only."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import Struct, field
from msgspec.structs import replace

from kvasir.core.commands import Candidate
from kvasir.costs.quick import QuickCosts

if TYPE_CHECKING:
    from kvasir.scheduling.few import FewView

T = TypeVar("T")

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Lengths(Struct, frozen=True, dict=True):
    """A number of tokens for each row, of which there are few different ones: row `i` has `values[which[i]]`."""

    values: tuple[int, ...]
    which: Ints

    @cached_property
    def tokens(self) -> Ints:
        return np.array(self.values, dtype=np.int64).take(self.which, mode="clip")

    def at(self, row: int) -> int:
        return self.values[int(self.which[row])]

    def seconds(self, seconds: Callable[[int], float]) -> Floats:
        """`seconds` of each row, asked for once for each of `values`."""
        return np.array([seconds(value) for value in self.values], dtype=np.float64).take(self.which, mode="clip")

    def only(self, rows: Ints) -> Lengths:
        return Lengths(self.values, self.which[rows])


class PrefillColumns(Struct, frozen=True):
    """The instances that can prefill, sorted by id, one row each.

    `wait_s`: predicted seconds until it gets to this prompt. `pace`: seconds of prefill that it does in a second, below 1
    where it decodes beside. `prefix`: of this prompt, cached in DRAM on its node; `deep`: in DRAM or on SSD.
    `queued` prefills of `queued_tokens` new tokens were sent and are not done. `batch` requests decode there or will,
    `kv_used` of its KV memory is spoken for (0 to 1). `can_decode`: what it prefills may stay there.
    """

    ids: tuple[str, ...]
    wait_s: Floats
    pace: Floats
    prefix: Lengths
    deep: Lengths
    queued: Ints
    queued_tokens: Ints
    batch: Ints
    kv_used: Floats
    can_decode: Bools

    @property
    def prefix_tokens(self) -> Ints:
        return self.prefix.tokens

    @property
    def deep_tokens(self) -> Ints:
        return self.deep.tokens

    def only(self, rows: Ints) -> PrefillColumns:
        return PrefillColumns(
            ids=tuple([self.ids[row] for row in rows.tolist()]),
            wait_s=self.wait_s[rows],
            pace=self.pace[rows],
            prefix=self.prefix.only(rows),
            deep=self.deep.only(rows),
            queued=self.queued[rows],
            queued_tokens=self.queued_tokens[rows],
            batch=self.batch[rows],
            kv_used=self.kv_used[rows],
            can_decode=self.can_decode[rows],
        )

    def __len__(self) -> int:
        return len(self.ids)


class DecodeColumns(Struct, frozen=True, dict=True):
    """The instances that can decode, sorted by id: what each was given already, those still in prefill included.

    Of these, `taken_batch` with `taken_context` and `taken_kv` tokens decode now. `can_prefill`: it may also do that, and has
    `queued` prefills. An answer stays `stays_s` there, worked out by `stays` if somebody asks.
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
    queued: Ints
    stays: Callable[[DecodeColumns], Floats]

    @cached_property
    def stays_s(self) -> Floats:
        return self.stays(self)

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

    def only(self, rows: Ints) -> DecodeColumns:
        return DecodeColumns(
            ids=tuple([self.ids[row] for row in rows.tolist()]),
            batch=self.batch[rows],
            context_tokens=self.context_tokens[rows],
            free_kv_tokens=self.free_kv_tokens[rows],
            max_batch=self.max_batch[rows],
            taken_batch=self.taken_batch[rows],
            taken_context=self.taken_context[rows],
            kv_tokens=self.kv_tokens[rows],
            taken_kv=self.taken_kv[rows],
            can_prefill=self.can_prefill[rows],
            queued=self.queued[rows],
            stays=self.stays,
        )

    def __len__(self) -> int:
        return len(self.ids)


Stays = Callable[[DecodeColumns], Floats]
"""How long an answer decodes on each of these instances, in seconds."""


class DecodeView(Struct, frozen=True, dict=True, kw_only=True):
    """What a decode rule sees, for one prompt: tokens after the first are due each `tbt_s`."""

    decodes: DecodeColumns
    num_prompt_tokens: int
    costs: QuickCosts
    kv_bytes_per_token: int
    tbt_s: float = math.inf

    def transfer_s(self, tokens: int) -> float:
        """Moving the KV of so many tokens from one node to another."""
        return self.costs.transfer_s(tokens * self.kv_bytes_per_token) if tokens > 0 else 0.0


class ClusterView(DecodeView, frozen=True, dict=True, kw_only=True):
    """What a placement policy sees: `best_tokens` is the longest prefix that any node holds in DRAM, on `source`; the first
    token is due in `due_in_s`.

    Prefill runs in steps of `chunk_tokens`, a pipeline in at most `max_stages` stages, of one node where `stage_node` says on
    which each instance is. With `layerwise`, transfers overlap waiting and compute layer by layer.
    """

    prefills: PrefillColumns
    best_tokens: int
    source: str | None
    block_tokens: int = 1
    due_in_s: float = math.inf
    chunk_tokens: int | None = None
    load_bandwidth: float = 0.0
    layerwise: bool = False
    max_stages: int = 1
    stage_node: Callable[[str], str] | None = None
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
        return self.prefills.prefix.seconds(self.prefill_s) / self.prefills.pace

    @cached_property
    def fetch_s(self) -> Floats:
        """Per instance: bring the longest prefix there, then prefill the rest; infinite where it is there already."""
        if self.source is None:
            return np.full(len(self.prefills), math.inf)
        rest_s = self.prefill_s(self.best_tokens)
        # infinite, what has not to be fetched stays so whatever is added
        transfer_s = self.prefills.prefix.seconds(lambda own: self.transfer_s(self.best_tokens - own) or math.inf)
        return self.exposed_s(transfer_s, rest_s) + rest_s / self.prefills.pace

    @cached_property
    def load_s(self) -> Floats:
        """Per instance: read from the node's SSD what is cached there beyond DRAM, prefill the rest; else infinite."""
        prefills = self.prefills
        if (
            not self.load_bandwidth
            or prefills.deep is prefills.prefix
            or not (prefills.deep_tokens > prefills.prefix_tokens).any()
        ):
            return np.full(len(prefills), math.inf)
        num_bytes = (prefills.deep_tokens - prefills.prefix_tokens) * float(self.kv_bytes_per_token)
        read_s: Floats = np.true_divide(num_bytes, self.load_bandwidth)
        rest_s = prefills.deep.seconds(self.prefill_s) / prefills.pace
        return np.where(read_s > 0.0, self.exposed_s(read_s, rest_s) + rest_s, math.inf)

    @cached_property
    def own_s(self) -> Floats:
        """Per instance: prefill from what its own node holds, in DRAM or on SSD, whichever is faster."""
        return np.minimum(self.local_s, self.load_s)

    def exposed_s(self, transfer_s: Floats, prefill_s: Floats | float) -> Floats:
        """What of a transfer neither waiting in the queue nor computing layer by layer hides."""
        if not self.layerwise:
            return transfer_s
        exposed_s: Floats = transfer_s - self.prefills.wait_s
        exposed_s -= prefill_s
        return np.maximum(exposed_s, 0.0, out=exposed_s)

    def local(self, row: int) -> Candidate:
        """Use what the node holds in DRAM, compute the rest."""
        return self._candidate(row, self.prefills.prefix.at(row), float(self.local_s[row]))

    def own(self, row: int) -> Candidate:
        """The plan behind `own_s`."""
        return self.load(row) if self.load_s[row] < self.local_s[row] else self.local(row)

    def fetch(self, row: int) -> Candidate:
        """Bring the longest prefix to the node, compute the rest. Only where `fetch_s` is finite."""
        own, best = self.prefills.prefix.at(row), self.best_tokens
        return self._candidate(row, best, float(self.fetch_s[row]), fetch_tokens=best - own, source=self.source)

    def load(self, row: int) -> Candidate:
        """Read what the node has on SSD, compute the rest. Only where `load_s` is finite."""
        own, deep = self.prefills.prefix.at(row), self.prefills.deep.at(row)
        return self._candidate(row, deep, float(self.load_s[row]), load_tokens=deep - own)

    def teams(self) -> list[list[int]]:
        """Rows of those that may be stages of one pipeline. First in each team are those that do nothing but prefill, in the
        order in which they are free.
        """
        prefills = self.prefills
        free_first: list[int] = np.argsort(np.where(prefills.pace < 1.0, np.inf, prefills.wait_s), kind="stable").tolist()
        node = self.stage_node
        return [free_first] if node is None else by_node(free_first, lambda row: node(prefills.ids[row]))

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


def by_node(some: list[T], node: Callable[[T], str]) -> list[list[T]]:
    """Those of each node, in their order."""
    groups: dict[str, list[T]] = {}
    for each in some:
        groups.setdefault(node(each), []).append(each)
    return list(groups.values())


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
