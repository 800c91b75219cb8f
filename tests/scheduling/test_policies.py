"""Each policy on a cluster small enough to work out by hand."""

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from msgspec import structs

from kvasir.core.commands import Candidate
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.costs.quick import quick
from kvasir.scheduling.decode_choice import DECODE_RULES, DecodeChoice, least_tbt
from kvasir.scheduling.policies import POLICIES, LeastLoaded, Local, Mooncake, Placement, RandomChoice, RoundRobin
from kvasir.scheduling.view import ClusterView, DecodeColumns, PrefillColumns
from tests.scheduling.views import decode_columns, lengths

COSTS = quick(FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 1e-3, 1e-6), 0.0, 1e6))  # 1 ms a token; 1 MB/s


def view(
    *prefills: tuple[float, int],
    best: int = 0,
    source: str | None = None,
    decodes: DecodeColumns | None = None,
    kv_bytes: int = 100,
) -> ClusterView:
    """Instances p0, p1, ... on nodes n0, n1, ... as (wait, own prefix) for 1,000 tokens; fetching a token takes 0.1 ms."""
    count = len(prefills)
    zeros = np.zeros(count, dtype=np.int64)
    prefix = lengths([prefix for _, prefix in prefills])
    return ClusterView(
        prefills=PrefillColumns(
            ids=tuple(f"p{i}" for i in range(count)),
            wait_s=np.array([wait_s for wait_s, _ in prefills], dtype=float),
            pace=np.ones(count),
            prefix=prefix,
            deep=prefix,
            queued=zeros,
            queued_tokens=zeros,
            batch=zeros,
            kv_used=np.zeros(count),
            can_decode=np.zeros(count, dtype=np.bool_),
        ),
        decodes=decodes or decode_columns(),
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
    assert len({c.instance for c in choice.candidates}) == len(choice.candidates)
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


def decode_on(*rows: tuple[str, int, int, int], prefill: str | None = None) -> DecodeChoice:
    candidate = None if prefill is None else Candidate(prefill, 0.0, 0.0, 1.0, 0)
    return least_tbt(view((0, 0), decodes=decode_columns(*rows)), candidate, 1100)


def test_decode_goes_where_the_step_will_be_shortest() -> None:
    choice = decode_on(("d0", 2, 100, 10_000), ("d1", 1, 5000, 10_000), prefill="p0")
    assert (choice.instance, choice.batch, choice.context_tokens) == ("d0", 3, 1100)
    assert choice.tbt_s == pytest.approx(0.010 + 0.003 + 0.0011)


def test_an_instance_without_room_is_taken_only_if_there_is_no_other() -> None:
    full, small, busy = ("d0", 8, 0, 10_000), ("d1", 0, 0, 1000), ("d2", 7, 100_000, 10_000)
    assert decode_on(full, small, busy).instance == "d2"
    assert not decode_on(full, small).fits


def test_a_mixed_instance_keeps_what_it_prefilled_while_it_has_room() -> None:
    assert decode_on(("d0", 0, 0, 10_000), ("p0", 5, 0, 10_000), prefill="p0").instance == "p0"
    assert decode_on(("d0", 0, 0, 10_000), ("p0", 8, 0, 10_000), prefill="p0").instance == "d0"


def test_other_rules_stay_or_count_requests() -> None:
    cluster = view((0, 0), decodes=decode_columns(("d0", 2, 0, 10_000), ("p0", 8, 0, 10_000)))
    candidate = Candidate("p0", 0.0, 0.0, 1.0, 0)
    assert DECODE_RULES["stay"](cluster, candidate, 1100).instance == "p0"
    assert DECODE_RULES["fewest-requests"](cluster, candidate, 1100).instance == "d0"


def test_ours_decodes_where_the_batch_will_be_small_when_the_prefill_is_done() -> None:
    """d0 has four who leave within 10 s, d1 three who have yet to come."""
    columns = DecodeColumns(
        ids=("d0", "d1"),
        batch=np.array([4, 3]),
        context_tokens=np.array([4000, 3000]),
        free_kv_tokens=np.array([6000, 7000]),
        max_batch=np.array([8, 8]),
        taken_batch=np.array([4, 0]),
        taken_context=np.array([4000, 0]),
        kv_tokens=np.array([10_000, 10_000]),
        taken_kv=np.array([4000, 0]),
        can_prefill=np.array([False, False]),
        queued=np.array([0, 0]),
        stays=lambda columns: np.array([10.0, 10.0]),
    )
    cluster = view((0, 0), decodes=columns)
    rule = DECODE_RULES["least-expected-tbt"]
    assert rule(cluster, Candidate("p0", 0.0, 0.0, 0.0, 0), 1100).instance == "d1"
    later = rule(cluster, Candidate("p0", 5.0, 0.0, 0.0, 0), 1100)
    assert (later.instance, later.batch, later.context_tokens) == ("d0", 3, 3000)
    assert list(columns.expected(20.0).batch) == [0, 1]  # of three who came in 20 s, half have left


def decode_by_ours(*rows: tuple[str, int, int, int], prefill: str = "p0", prefill_s: float = 1.0) -> str:
    """Instances whose name begins with m are mixed."""
    columns = decode_columns(*rows)
    columns = structs.replace(columns, can_prefill=np.array([name.startswith("m") for name in columns.ids]))
    cluster = structs.replace(view((0, 0), decodes=columns), tbt_s=0.1)
    return DECODE_RULES["least-expected-tbt"](cluster, Candidate(prefill, 0.0, 0.0, prefill_s, 0), 1100).instance


def test_ours_fills_those_that_only_decode_first_and_leaves_a_burst_room() -> None:
    idle = ("m0", 0, 0, 10_000)
    assert decode_by_ours(("d0", 5, 5000, 5000), idle) == "d0"
    assert decode_by_ours(("d0", 5, 5000, 5000), ("d1", 3, 3000, 7000), idle) == "d1"
    assert decode_by_ours(("d0", 7, 1000, 9000), idle) == "m0"  # 7 of 8 seats
    assert decode_by_ours(("d0", 5, 8500, 1500), idle) == "m0"  # 87 % of its memory when the prefill is done
    assert decode_by_ours(("d0", 5, 80_000, 500_000), idle) == "m0"  # steps of 88 ms


def test_ours_keeps_a_prompt_on_a_mixed_instance_when_its_hand_off_would_show() -> None:
    """1,000 tokens take 0.1 s to move."""
    rows = ("d0", 2, 2000, 8000), ("m0", 0, 0, 10_000)
    assert decode_by_ours(*rows, prefill="m0", prefill_s=0.05) == "m0"
    assert decode_by_ours(*rows, prefill="m0", prefill_s=0.2) == "d0"
