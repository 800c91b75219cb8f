"""Drawing the next token from logits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from kvasir.core.request import Sampling
from kvasir.engine.interface import SampledToken

_TOP_P_CANDIDATES = 1024  # tried before a full sort: enough for nearly every distribution, and 30 times cheaper at 150k words


@dataclass(frozen=True, slots=True)
class Draw:
    """One row of logits: whose it is, how to draw, and the position that the new token will have."""

    request_id: str
    sampling: Sampling
    position: int


class Sampler:
    """Draws tokens; every draw is a pure function of the logits, the sampling parameters, the seed and the position.

    A draw takes one uniform number, hashed from (seed, position), and inverts the distribution's cumulative sum: the
    tokens in order of their ids, or from the most likely one down where `top_k` or `top_p` cut it. So neither the batch
    around a request nor the machine or the instance it runs on changes what is drawn. Without a seed, the request's id and a
    secret from the operating system, drawn once per process, take its place.
    """

    def __init__(self, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._secret = entropy(16)

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[SampledToken]:
        """One token for each row of logits [S, vocab]."""
        tokens = self._tokens(logits, draws)
        if all(draw.sampling.logprobs is None for draw in draws):
            return [SampledToken(token) for token in tokens]
        return _with_logprobs(logits, tokens, draws)

    def _tokens(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        tokens: list[int] = logits.argmax(-1).tolist()
        drawn = [i for i, draw in enumerate(draws) if draw.sampling.temperature > 0]
        for is_cut in (False, True):
            rows = [i for i in drawn if _is_cut(draws[i].sampling) == is_cut]
            if rows:
                chosen = self._draw(logits[rows], [draws[i] for i in rows], is_cut=is_cut)
                for row, token in zip(rows, chosen, strict=True):
                    tokens[row] = token
        return tokens

    def _draw(self, logits: Tensor, draws: Sequence[Draw], *, is_cut: bool) -> list[int]:
        temperature = _column(logits, [d.sampling.temperature for d in draws])
        wide = logits.double()
        wide = (wide - wide.amax(-1, keepdim=True)) / temperature  # [R, vocab]; the shift keeps tiny temperatures finite
        uniform = _column(logits, [self._uniform(d) for d in draws])
        if not is_cut:
            chosen: list[int] = _invert(wide.softmax(-1), uniform).tolist()
            return chosen
        return [_draw_cut(row, u, sampling=d.sampling) for row, u, d in zip(wide, uniform, draws, strict=True)]

    def _uniform(self, draw: Draw) -> float:
        """In [0, 1), 53 bits."""
        seed = draw.sampling.seed
        key = self._secret + draw.request_id.encode() if seed is None else b"seed" + str(seed).encode()
        digest = blake2b(draw.position.to_bytes(8, "little"), key=blake2b(key, digest_size=32).digest(), digest_size=8)
        return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53


def _is_cut(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1


def _column(like: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative probability exceeds `uniform` [R, 1] of the total: [R, N] -> [R]."""
    cumulative = probabilities.cumsum(-1)
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return index.clamp_(max=probabilities.shape[-1] - 1).squeeze(-1)


def _draw_cut(scaled: Tensor, uniform: Tensor, *, sampling: Sampling) -> int:
    """Draw from one row [vocab] after top_k, then top_p of what top_k left (as vLLM orders them)."""
    probabilities, ids = _candidates(scaled, sampling)
    before = probabilities.cumsum(-1) - probabilities
    is_out = before >= sampling.top_p  # the token that crosses top_p stays
    is_out[0] = False
    return int(ids[_invert(probabilities.masked_fill(is_out, 0.0)[None], uniform[None])])


def _candidates(scaled: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities and ids of the tokens that can be drawn, most likely first; top_p is yet to be applied."""
    vocab = len(scaled)
    if 0 < sampling.top_k < vocab:
        values, ids = scaled.topk(sampling.top_k)
        return values.softmax(-1), ids
    total = scaled.logsumexp(-1)
    if vocab > _TOP_P_CANDIDATES and sampling.top_p < 1:
        values, ids = scaled.topk(_TOP_P_CANDIDATES)
        probabilities = (values - total).exp()
        if probabilities.sum() >= sampling.top_p:
            return probabilities, ids
    values, ids = torch.sort(scaled, descending=True, stable=True)
    return (values - total).exp(), ids


def _with_logprobs(logits: Tensor, tokens: list[int], draws: Sequence[Draw]) -> list[SampledToken]:
    """The chosen tokens with their logprobs under the unmodified distribution, and the most likely ones where asked."""
    sampled = [SampledToken(token) for token in tokens]
    for i, draw in enumerate(draws):
        if draw.sampling.logprobs is None:
            continue
        logprobs = logits[i].float().log_softmax(-1)
        best = logprobs.topk(min(draw.sampling.logprobs, len(logprobs)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        sampled[i] = SampledToken(tokens[i], float(logprobs[tokens[i]]), top)
    return sampled
