"""Each policy on a cluster small enough to work out by hand."""

from collections.abc import Callable
from random import Random

import pytest

from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.scheduling.decode_choice import choose_decode
from kvasir.scheduling.policies import POLICIES, LeastLoaded, Local, Mooncake, Placement, RandomChoice, RoundRobin
from kvasir.scheduling.view import ClusterView, DecodeView, PrefillView

COSTS = FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 1e-3, 1e-6), 0.0, 1e6)  # 1 ms a token; 1 MB/s


def view(
    *prefills: tuple[float, int],
    best: int = 0,
    source: str | None = None,
    decodes: tuple[DecodeView, ...] = (),
    kv_bytes: int = 100,
) -> ClusterView:
    """Instances p0, p1, ... on nodes n0, n1, ... as (wait, own prefix) for 1,000 tokens; fetching a token takes 0.1 ms."""
    return ClusterView(
        prefills=tuple(PrefillView(f"p{i}", f"n{i}", wait_s, prefix) for i, (wait_s, prefix) in enumerate(prefills)),
        decodes=decodes,
        num_prompt_tokens=1000,
        best_tokens=best,
        source=source,
        costs=COSTS,
        kv_bytes_per_token=kv_bytes,
    )


def chosen(policy: Placement, cluster: ClusterView) -> str:
    return policy.place(cluster, Random(1)).chosen.instance


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_every_policy_chooses_one_of_its_candidates_and_says_why(make: Callable[[], Placement]) -> None:
    choice = make().place(view((1.0, 0), (0.5, 400), best=400, source="n1"), Random(1))
    assert choice.chosen in choice.candidates
    assert choice.chosen.instance in {"p0", "p1"}
    assert choice.why


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_every_policy_decides_the_same_with_the_same_seed(make: Callable[[], Placement]) -> None:
    cluster = view((0.1, 0), (0.1, 0), (0.1, 0))

    def choices() -> list[str]:
        policy, rng = make(), Random(7)
        return [policy.place(cluster, rng).chosen.instance for _ in range(10)]

    assert choices() == choices()


def test_the_table_names_policies_as_they_name_themselves() -> None:
    assert {name: make().name for name, make in POLICIES.items()} == {name: name for name in POLICIES}


def test_random_reaches_everybody() -> None:
    policy, rng = RandomChoice(), Random(1)
    cluster = view((0.0, 0), (9.0, 0), (0.0, 0))
    assert {policy.place(cluster, rng).chosen.instance for _ in range(50)} == {"p0", "p1", "p2"}


def test_round_robin_takes_turns_and_goes_on_when_instances_come_and_go() -> None:
    policy = RoundRobin()
    three, two = view((0, 0), (0, 0), (0, 0)), view((0, 0), (0, 0))
    assert [chosen(policy, c) for c in (three, three, two, three, three, three)] == ["p0", "p1", "p0", "p1", "p2", "p0"]


def test_least_loaded_looks_at_the_queue_alone() -> None:
    assert chosen(LeastLoaded(), view((0.2, 1000), (0.1, 0))) == "p1"


def test_local_weighs_the_queue_against_its_own_cache() -> None:
    assert chosen(Local(), view((0.2, 400), (0.1, 0))) == "p0"  # 0.2 + 0.6 against 0.1 + 1.0
    assert chosen(Local(), view((0.6, 400), (0.1, 0))) == "p1"


def test_local_never_fetches() -> None:
    choice = Local().place(view((0.0, 0), (2.0, 900), best=900, source="n1"), Random(1))
    assert choice.chosen.instance == "p0"
    assert choice.chosen.source is None


def test_equal_predictions_go_to_the_lower_id() -> None:
    for policy in (LeastLoaded(), Local(), Mooncake()):
        assert chosen(policy, view((0.1, 0), (0.1, 0))) == "p0"


def test_mooncake_fetches_when_the_best_prefix_is_much_longer() -> None:
    candidate = Mooncake(4.0).place(view((0.0, 100), (5.0, 900), best=900, source="n1"), Random(1)).chosen
    assert (candidate.instance, candidate.prefix_tokens, candidate.fetch_tokens, candidate.source) == ("p0", 900, 800, "n1")
    assert candidate.ttft_s == pytest.approx(0.08 + 0.1)


def test_mooncake_computes_when_its_own_prefix_is_long_enough() -> None:
    candidate = Mooncake(4.0).place(view((0.0, 225), (5.0, 900), best=900, source="n1"), Random(1)).chosen
    assert (candidate.prefix_tokens, candidate.fetch_tokens) == (225, 0)


def test_an_own_prefix_of_nothing_is_an_infinite_ratio() -> None:
    candidate = Mooncake(1e9).place(view((0.0, 0), (5.0, 100), best=100, source="n1"), Random(1)).chosen
    assert candidate.fetch_tokens == 100


def test_mooncake_never_fetches_what_is_faster_to_compute() -> None:
    slow = view((0.0, 0), (5.0, 900), best=900, source="n1", kv_bytes=2000)  # 2 ms to fetch a token, 1 ms to compute it
    candidate = Mooncake().place(slow, Random(1)).chosen
    assert (candidate.instance, candidate.fetch_tokens) == ("p0", 0)


def test_the_node_that_holds_the_best_prefix_fetches_nothing() -> None:
    assert Mooncake().place(view((0.0, 900), best=900, source="n0"), Random(1)).chosen.fetch_tokens == 0


def decode(name: str, *, batch: int = 0, context: int = 0, free: int = 10_000, max_batch: int = 8) -> DecodeView:
    return DecodeView(name, "n", batch, context, free, max_batch)


def test_decode_goes_where_the_step_will_be_shortest() -> None:
    cluster = view((0, 0), decodes=(decode("d0", batch=2, context=100), decode("d1", batch=1, context=5000)))
    choice = choose_decode(cluster, prefill="p0", kv_tokens=1100)
    assert (choice.instance, choice.batch, choice.context_tokens) == ("d0", 3, 1100)
    assert choice.tbt_s == pytest.approx(0.010 + 0.003 + 0.0011)


def test_an_instance_without_room_is_taken_only_if_there_is_no_other() -> None:
    full, small, busy = decode("d0", batch=8), decode("d1", free=1000), decode("d2", batch=7, context=100_000)
    assert choose_decode(view((0, 0), decodes=(full, small, busy)), prefill=None, kv_tokens=1100).instance == "d2"
    assert not choose_decode(view((0, 0), decodes=(full, small)), prefill=None, kv_tokens=1100).fits


def test_a_mixed_instance_keeps_what_it_prefilled_while_it_has_room() -> None:
    decodes = (decode("d0"), decode("p0", batch=5))
    assert choose_decode(view((0, 0), decodes=decodes), prefill="p0", kv_tokens=1100).instance == "p0"
    decodes = (decode("d0"), decode("p0", batch=8))
    assert choose_decode(view((0, 0), decodes=decodes), prefill="p0", kv_tokens=1100).instance == "d0"
