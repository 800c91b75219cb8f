"""Draws: greedy, cut and seeded; their statistics; logprobs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvasir.core.request import Sampling
from kvasir.engine.torch.sampling import Draw, Sampler

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -30.0])


def draws(sampling: Sampling, count: int, name: str = "a") -> list[Draw]:
    return [Draw(name, sampling, position) for position in range(count)]


def frequencies(logits: Tensor, sampling: Sampling, count: int = 4000) -> Tensor:
    """How often each token is drawn at `count` positions of one request."""
    sampled = Sampler().sample(logits.expand(count, -1), draws(sampling, count))
    found = Counter(s.token for s in sampled)
    return torch.tensor([found[i] / count for i in range(len(logits))])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    assert (frequencies(LOGITS, Sampling(temperature=temperature, seed=1)) - expected).abs().max() < 0.03


def test_top_k_draws_among_the_k_likeliest() -> None:
    found = frequencies(LOGITS, Sampling(top_k=2, seed=1))
    expected = torch.zeros(6)
    expected[[0, 4]] = LOGITS[[0, 4]].softmax(-1)
    assert (found - expected).abs().max() < 0.03


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, [0]), (0.6, [0, 4]), (0.85, [0, 4, 1])])
def test_top_p_keeps_the_likeliest_tokens_up_to_the_one_that_crosses_it(top_p: float, kept: list[int]) -> None:
    found = frequencies(LOGITS, Sampling(top_p=top_p, seed=1))
    expected = torch.zeros(6)
    expected[kept] = LOGITS[kept].softmax(-1)
    assert (found - expected).abs().max() < 0.03


def test_top_p_applies_to_what_top_k_left() -> None:
    """Of the three likeliest alone, 0.51, 0.31 and 0.19, a top_p of 0.8 leaves two; of all tokens it would leave three."""
    found = frequencies(LOGITS, Sampling(top_k=3, top_p=0.8, seed=1))
    assert found[[0, 4]].min() > 0.2
    assert found[[1, 2, 3, 5]].max() == 0
    assert frequencies(LOGITS, Sampling(top_p=0.8, seed=1))[1] > 0.1


def test_equally_likely_tokens_are_cut_by_their_ids() -> None:
    assert frequencies(torch.zeros(50), Sampling(top_k=3, seed=1), 200).nonzero().flatten().tolist() == [0, 1, 2]


def test_top_p_over_a_large_vocabulary_agrees_with_a_full_sort() -> None:
    torch.manual_seed(0)
    for spread in (0.5, 5.0):
        logits = spread * torch.randn(5000)
        sampled = Sampler().sample(logits.expand(300, -1), draws(Sampling(top_p=0.8, seed=2), 300))
        order = logits.argsort(descending=True)
        probabilities = logits.softmax(-1)[order]
        kept = set(order[: int((probabilities.cumsum(-1) < 0.8).sum()) + 1].tolist())
        assert {s.token for s in sampled} <= kept
        assert len({s.token for s in sampled}) > 10


def test_temperature_zero_is_greedy_and_the_first_of_equals_wins() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, 0.0, 0.5]], dtype=torch.bfloat16)
    sampled = Sampler().sample(logits, draws(Sampling(temperature=0.0), 2))
    assert [s.token for s in sampled] == [1, 0]


def test_a_tiny_temperature_is_greedy_too() -> None:
    assert frequencies(LOGITS, Sampling(temperature=1e-9, seed=1), 50)[0] == 1


def test_a_seeded_draw_depends_on_seed_and_position_alone() -> None:
    """Not on the process, the request's name, the row or what else is in the batch."""
    torch.manual_seed(0)
    logits = torch.randn(12, 400)
    mixed = [Sampling(seed=7), Sampling(seed=7, top_p=0.9), Sampling(temperature=0.0), Sampling(seed=8, top_k=5)]
    batch = [Draw(f"r{i}", mixed[i % 4], 100 + i) for i in range(12)]
    together = [s.token for s in Sampler().sample(logits, batch)]
    alone = [Sampler().sample(logits[i : i + 1], [replace(d, request_id="other")])[0].token for i, d in enumerate(batch)]
    assert together == alone


def test_positions_and_seeds_give_different_draws() -> None:
    logits = torch.zeros(64, 1000)
    by_position = Sampler().sample(logits, draws(Sampling(seed=1), 64))
    by_seed = Sampler().sample(logits, [Draw("a", Sampling(seed=seed), 0) for seed in range(64)])
    assert len({s.token for s in by_position}) > 50
    assert len({s.token for s in by_seed}) > 50


def test_without_a_seed_requests_and_processes_differ() -> None:
    logits = torch.zeros(16, 5000)
    first, second = Sampler(), Sampler()
    drawn = first.sample(logits, draws(Sampling(), 16, "a"))
    assert first.sample(logits, draws(Sampling(), 16, "a")) == drawn
    assert first.sample(logits, draws(Sampling(), 16, "b")) != drawn
    assert second.sample(logits, draws(Sampling(), 16, "a")) != drawn


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    sampling = Sampling(temperature=0.3, top_k=4, seed=1, logprobs=5)
    expected = logits.log_softmax(-1)
    for row, sampled in enumerate(Sampler().sample(logits, draws(sampling, 3))):
        assert sampled.logprob == pytest.approx(float(expected[row, sampled.token]))
        best = expected[row].topk(5)
        assert [token for token, _ in sampled.top] == best.indices.tolist()
        assert [p for _, p in sampled.top] == pytest.approx(best.values.tolist())


def test_logprobs_zero_reports_the_chosen_token_alone() -> None:
    none, chosen = Sampler().sample(
        LOGITS.expand(2, -1), [Draw("a", Sampling(temperature=0), 0), Draw("b", Sampling(temperature=0, logprobs=0), 0)]
    )
    assert none.logprob is None
    assert chosen.logprob == pytest.approx(float(LOGITS.log_softmax(-1)[0]))
    assert chosen.top == ()
