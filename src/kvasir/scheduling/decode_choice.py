"""Where a request will decode: one rule per function, one row per rule in the table."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Final

import numpy as np
from msgspec.structs import replace
from mypy_extensions import mypyc_attr

from kvasir.core.commands import Candidate
from kvasir.scheduling.view import DecodeColumns, DecodeView, Floats

FULL: Final = 0.85
"""Instances that only decode are filled up to this as long as others can take the rest: what is left takes a burst."""


@mypyc_attr(acyclic=True)
class DecodeChoice:
    """`tbt_s` is the predicted step time of the batch with the request in it.

    Not `fits`: `ahead` requests, at least, must leave before there is room for it.
    """

    __slots__ = ("ahead", "batch", "context_tokens", "fits", "instance", "tbt_s")

    def __init__(self, instance: str, tbt_s: float, batch: int, context_tokens: int, fits: bool, ahead: int):
        self.instance = instance
        self.tbt_s = tbt_s
        self.batch = batch
        self.context_tokens = context_tokens
        self.fits = fits
        self.ahead = ahead


DecodeRule = Callable[[DecodeView, Candidate | None, int], DecodeChoice]
"""(view, its prefill or None when that is done, KV tokens that it will come to hold); `view.decodes` is not empty."""


def least_tbt(view: DecodeView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    """Least predicted TBT among those with room. A mixed instance that prefilled keeps the request if it can: no KV moves."""
    own = _row_of(view.decodes, prefill)
    if own is not None and (choice := _choice(view, own, kv_tokens)).fits:
        return choice
    decodes = view.decodes
    tbt_s = view.costs.decode_steps_s(decodes.batch + 1, decodes.context_tokens + view.num_prompt_tokens)
    fits = (decodes.batch < decodes.max_batch) & (kv_tokens <= decodes.free_kv_tokens)
    return _choice(view, int(np.where(fits, tbt_s, tbt_s + 1e6).argmin()), kv_tokens)


def least_expected_tbt(view: DecodeView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    """Ours: as `least-tbt`, on the batches expected when the prefill will be done.

    Instances that only decode are filled first, up to FULL: on one that also prefills, each answer takes time from that. What
    is prefilled there moves away, too, if the prefill hides the hand-off.
    """
    if prefill is not None:
        view = replace(view, decodes=view.decodes.expected(prefill.ttft_s))
    decodes = view.decodes
    if decodes.can_prefill.all() or not decodes.can_prefill.any():
        return least_tbt(view, prefill, kv_tokens)
    if prefill is not None and _shows(view, prefill):
        return least_tbt(view, prefill, kv_tokens)
    tbt_s = view.costs.decode_steps_s(decodes.batch + 1, decodes.context_tokens + view.num_prompt_tokens)
    held = decodes.kv_tokens - decodes.free_kv_tokens + kv_tokens
    has_room = (
        (decodes.batch + 1 <= FULL * decodes.max_batch) & (held <= FULL * decodes.kv_tokens) & (tbt_s <= FULL * view.tbt_s)
    )
    has_room &= ~decodes.can_prefill
    if not has_room.any():
        return least_tbt(view, prefill, kv_tokens)
    return _choice(view, int(np.where(has_room, tbt_s, np.inf).argmin()), kv_tokens)


def fewest_requests(view: DecodeView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    """The smallest batch, whatever its contexts (least outstanding requests, what most routers do)."""
    return _choice(view, int(np.argmin(view.decodes.batch)), kv_tokens)


def stay(view: DecodeView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    """Where it prefilled: co-located serving."""
    own = _row_of(view.decodes, prefill)
    return least_tbt(view, prefill, kv_tokens) if own is None else _choice(view, own, kv_tokens)


def fewest_tokens(view: DecodeView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    """The least KV to read (Dynamo's decode router, which counts active blocks and nothing else)."""
    return _choice(view, int(np.argmin(view.decodes.context_tokens)), kv_tokens)


def llm_d(view: DecodeView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    """llm-d's scorers without the prefix: 2 * shortness of the waiting queue + 2 * free share of KV memory.

    Those wait who are more than `max_batch`.
    """
    waiting = np.maximum(0, view.decodes.batch - view.decodes.max_batch)
    span = max(1, int(np.ptp(waiting)))  # equal queues then differ by 0, which is all that counts
    scores = 2.0 * (waiting.max() - waiting) / span + 2.0 * _free_share(view.decodes)
    return _choice(view, int(np.argmax(scores)), kv_tokens)


def aibrix(view: DecodeView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    """AIBrix: the fewest requests if they differ by 16 or more, else least `(requests + 1 - throughput) / free KV`.

    Each is divided by its maximum. Throughput, which AIBrix measures, is predicted; its shortcuts for uneven throughput,
    whose thresholds are in tokens a second of certain hardware, are left out.
    """
    batch = view.decodes.batch
    if np.ptp(batch) >= 16:
        return fewest_requests(view, prefill, kv_tokens)
    throughput = _tokens_per_s(view)
    free = np.maximum(0.001, _free_share(view.decodes))
    load = batch / max(1, batch.max()) + 1.0 - throughput / max(1.0, throughput.max())
    return _choice(view, int(np.argmin(load / (free / free.max()))), kv_tokens)


def aibrix_conductor(view: DecodeView, prefill: Candidate | None, kv_tokens: int) -> DecodeChoice:
    """AIBrix's conductor: least `1000 / throughput * (1 + 1 / requests)`, half as much again above 90 % of KV memory.

    1000 / throughput, 20 where nothing decodes, is called the TBT in ms there, though throughput is the whole batch's.
    """
    throughput = _tokens_per_s(view)
    tbt_ms = np.where(throughput > 0.0, 1000.0 / np.maximum(1e-9, throughput), 20.0)
    tbt_ms *= 1.0 + 1.0 / np.maximum(1, view.decodes.batch)
    tbt_ms[_free_share(view.decodes) < 0.1] *= 1.5
    return _choice(view, int(np.argmin(tbt_ms)), kv_tokens)


DECODE_RULES: dict[str, DecodeRule] = {
    "least-tbt": least_tbt,
    "least-expected-tbt": least_expected_tbt,
    "fewest-requests": fewest_requests,
    "stay": stay,
    "fewest-tokens": fewest_tokens,
    "llm-d": llm_d,
    "aibrix": aibrix,
    "aibrix-conductor": aibrix_conductor,
}
"""Name on the command line → rule."""


def _free_share(decodes: DecodeColumns) -> Floats:
    """Share of KV memory that is free, 0 to 1; the view says what is free and what contexts take."""
    free = np.maximum(0, decodes.free_kv_tokens)
    return np.true_divide(free, np.maximum(1, free + decodes.context_tokens))


def _tokens_per_s(view: DecodeView) -> Floats:
    """Predicted throughput of each decode batch."""
    decodes = view.decodes
    return decodes.batch / view.costs.decode_steps_s(np.maximum(1, decodes.batch), decodes.context_tokens)


def _shows(view: DecodeView, prefill: Candidate) -> bool:
    """Whether the hand-off to another would take longer than the prefill that hides it."""
    return _row_of(view.decodes, prefill) is not None and view.transfer_s(view.num_prompt_tokens) > prefill.prefill_s


def _row_of(decodes: DecodeColumns, prefill: Candidate | None) -> int | None:
    if prefill is None:
        return None
    row = bisect_left(decodes.ids, prefill.instance)
    return row if row < len(decodes) and decodes.ids[row] == prefill.instance else None


def _choice(view: DecodeView, row: int, kv_tokens: int) -> DecodeChoice:
    decodes = view.decodes
    batch, max_batch = int(decodes.batch[row]) + 1, int(decodes.max_batch[row])
    context = int(decodes.context_tokens[row]) + view.num_prompt_tokens
    fits = batch <= max_batch and kv_tokens <= int(decodes.free_kv_tokens[row])
    ahead = 0 if fits else max(1, batch - max_batch)
    return DecodeChoice(decodes.ids[row], view.costs.decode_step_s(batch, context), batch, context, fits, ahead)
