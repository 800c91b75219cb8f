"""Where a request will decode: least predicted TBT among the instances that can hold it."""

from __future__ import annotations

from msgspec import Struct

from kvasir.scheduling.view import ClusterView, DecodeView


class DecodeChoice(Struct, frozen=True):
    """`tbt_s` is the predicted step time of the batch with the request in it.

    Not `fits`: `ahead` requests, at least, must leave before there is room for it.
    """

    instance: str
    tbt_s: float
    batch: int
    context_tokens: int
    fits: bool
    ahead: int


def choose_decode(view: ClusterView, *, prefill: str | None, kv_tokens: int) -> DecodeChoice:
    """`kv_tokens` is what the request will come to hold. `view.decodes` is not empty.

    A mixed instance that prefilled keeps the request if it can, since no KV needs to move.
    """
    choices = [_choice(view, decode, kv_tokens) for decode in view.decodes]
    for choice in choices:
        if choice.instance == prefill and choice.fits:
            return choice
    return min(choices, key=lambda c: (not c.fits, c.tbt_s, c.instance))


def _choice(view: ClusterView, decode: DecodeView, kv_tokens: int) -> DecodeChoice:
    batch, context = decode.batch + 1, decode.context_tokens + view.num_prompt_tokens
    fits = batch <= decode.max_batch and kv_tokens <= decode.free_kv_tokens
    ahead = 0 if fits else max(1, batch - decode.max_batch)
    return DecodeChoice(decode.id, view.costs.decode_step_s(batch, context), batch, context, fits, ahead)
