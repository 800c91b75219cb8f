"""Block contents: the same for the same id and seed, different otherwise, from the allowed ids only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.core.errors import ConfigError
from kvasir.workload.content import BlockContent
from kvasir.workload.trace import TraceRequest

GOLDEN = [7622, 8228, 19466, 6813, 6950, 10818, 7623, 8228, 19466]
IDS = st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True)


def request_of(ids: list[int], input_tokens: int) -> TraceRequest:
    return TraceRequest(0.0, input_tokens, 1, tuple(ids))


@given(IDS, st.integers(1, 64), st.integers(0, 2**70))
def test_a_prompt_is_as_long_as_asked_and_made_of_allowed_ids(ids: list[int], block_tokens: int, seed: int) -> None:
    length = block_tokens * len(ids) - block_tokens // 2
    prompt = BlockContent(range(100, 120), block_tokens, seed).prompt(request_of(ids, length))
    assert len(prompt) == length
    assert set(prompt) <= set(range(100, 120))


@given(IDS)
def test_the_same_id_has_the_same_tokens_wherever_it_stands(ids: list[int]) -> None:
    content = BlockContent(range(1000, 30_000), 16, seed=5)
    together = content.prompt(request_of(ids, 16 * len(ids)))
    alone = [token for i in ids for token in content.prompt(request_of([i], 16))]
    assert together == alone


def test_ids_differ_within_their_first_tokens_even_in_tiny_vocabularies() -> None:
    content = BlockContent(range(10), 4)
    blocks = {tuple(content.prompt(request_of([i], 4))) for i in range(10_000)}
    assert len(blocks) == 10_000


def test_another_seed_gives_other_content() -> None:
    prompts = [BlockContent(range(1000, 30_000), 32, seed).prompt(request_of([0, 1], 64)) for seed in (0, 1)]
    assert prompts[0][0] != prompts[1][0]
    assert sum(a == b for a, b in zip(*prompts, strict=True)) < 3


def test_the_content_of_a_seed_never_changes() -> None:
    """A golden value: replays of different versions and machines must send the same prompts."""
    assert BlockContent(range(1000, 20_000), 6, seed=7).prompt(request_of([0, 1], 9)) == GOLDEN


def test_a_list_of_ids_serves_as_vocabulary() -> None:
    assert set(BlockContent([5, 7, 11], 64).prompt(request_of([3], 64))) == {5, 7, 11}


def test_impossible_vocabularies_and_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="not a vocabulary"):
        BlockContent([1], 16)
    with pytest.raises(ConfigError, match="not a block size"):
        BlockContent(range(10), 0)
