"""What other systems do, each on a cluster small enough to work out by hand from its published formula."""

from random import Random

import numpy as np
import pytest

from kvasir.core.request import Slo
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.costs.quick import quick
from kvasir.scheduling.chunking import BatcherConfig
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.decode_choice import DECODE_RULES
from kvasir.scheduling.policies import POLICIES, Choice, Mooncake
from kvasir.scheduling.policies.llm_d import shortness
from kvasir.scheduling.strategy import STRATEGIES
from kvasir.scheduling.view import ClusterView, DecodeView, PrefillColumns
from tests.scheduling.views import decode_columns, lengths

COSTS = quick(FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 1e-3, 1e-6), 0.0, 1e6))  # 1 ms a token; 1 MB/s

PEERS = ("memserve", "dynamo", "llm-d", "sglang", "aibrix", "aibrix-conductor", "ray", "production-stack")


def cluster(
    *prefix: int,
    wait_s: tuple[float, ...] = (),
    deep: tuple[int, ...] = (),
    queued: tuple[int, ...] = (),
    queued_tokens: tuple[int, ...] = (),
    batch: tuple[int, ...] = (),
    kv_used: tuple[float, ...] = (),
    context: tuple[int, ...] = (),
    kv_bytes: int = 100,
    layerwise: bool = False,
) -> ClusterView:
    """Instances p0, p1, ... with these prefixes of 1,000 tokens, all else 0 unless told; a token is fetched in 0.1 ms.

    They decode too if `context` says what.
    """
    count = len(prefix)
    ids = tuple(f"p{i}" for i in range(count))
    best = max(prefix)

    def ints(column: tuple[int, ...]) -> np.ndarray:
        return np.array(column or [0] * count, dtype=np.int64)

    return ClusterView(
        prefills=PrefillColumns(
            ids=ids,
            wait_s=np.array(wait_s or [0.0] * count),
            pace=np.ones(count),
            prefix=lengths(prefix),
            deep=lengths(deep or prefix),
            queued=ints(queued),
            queued_tokens=ints(queued_tokens),
            batch=ints(batch),
            kv_used=np.array(kv_used or [0.0] * count),
            can_decode=np.array([bool(context)] * count),
        ),
        decodes=decode_columns(*((name, 1, tokens, 10_000) for name, tokens in zip(ids, context, strict=False))),
        num_prompt_tokens=1000,
        best_tokens=best,
        source=f"n{prefix.index(best)}" if best else None,
        costs=COSTS,
        kv_bytes_per_token=kv_bytes,
        block_tokens=100,
        load_bandwidth=1e6 if deep else 0.0,
        layerwise=layerwise,
    )


def place(policy: str, view: ClusterView) -> Choice:
    return POLICIES[policy]().place(view, Random(1))


def chosen(policy: str, view: ClusterView) -> str:
    return place(policy, view).chosen.instance


def decode_by(rule: str, *rows: tuple[str, int, int, int]) -> str:
    view = DecodeView(decodes=decode_columns(*rows), num_prompt_tokens=1000, costs=COSTS, kv_bytes_per_token=100)
    return DECODE_RULES[rule](view, None, 1100).instance


@pytest.mark.parametrize("policy", PEERS)
def test_equal_instances_go_to_the_lower_id(policy: str) -> None:
    assert chosen(policy, cluster(400, 400)) == "p0"


@pytest.mark.parametrize("policy", sorted(set(PEERS) - {"memserve"}))
def test_only_memserve_fetches_from_another_node(policy: str) -> None:
    busy = cluster(0, 900, queued=(0, 100), queued_tokens=(0, 100_000), wait_s=(0.0, 100.0), kv_used=(0.0, 0.9))
    choice = place(policy, busy)
    assert (choice.chosen.instance, choice.chosen.prefix_tokens) == ("p0", 0)
    assert all(candidate.source is None for candidate in choice.candidates)


def test_memserve_does_not_weigh_the_fetch_in_its_choice() -> None:
    view = cluster(0, 900, wait_s=(0.0, 0.8))  # 1.0 against 0.8 + 0.1, though p0 with a fetch would have 0.09 + 0.1
    assert chosen("memserve", view) == "p1"
    assert Mooncake().place(view, Random(1)).chosen.instance == "p0"


@pytest.mark.parametrize(("kv_bytes", "fetched"), [(1000, 900), (1001, 0)])
def test_memserve_fetches_when_the_transfer_takes_no_longer_than_what_it_saves(kv_bytes: int, fetched: int) -> None:
    view = cluster(0, 900, wait_s=(0.0, 5.0), kv_bytes=kv_bytes)  # saves 1.0 - 0.1; transfer 0.9 or a little more
    assert place("memserve", view).chosen.fetch_tokens == fetched


def test_memserve_counts_the_whole_transfer_even_where_layers_hide_it() -> None:
    view = cluster(0, 900, wait_s=(3.0, 5.0), kv_bytes=1001, layerwise=True)
    assert place("memserve", view).chosen.fetch_tokens == 0


@pytest.mark.parametrize(("queued_tokens", "instance"), [(299, "p0"), (301, "p1")])
def test_dynamo_credits_three_quarters_of_a_prefix_in_dram(queued_tokens: int, instance: str) -> None:
    assert chosen("dynamo", cluster(400, 0, queued_tokens=(queued_tokens, 0))) == instance  # 700 + queued against 1000


@pytest.mark.parametrize(("context", "instance"), [(299, "p0"), (301, "p1")])
def test_dynamo_adds_what_an_instance_decodes(context: int, instance: str) -> None:
    assert chosen("dynamo", cluster(400, 0, batch=(1, 0), context=(context, 0))) == instance


@pytest.mark.parametrize(("dram", "instance", "load_tokens"), [(200, "p0", 800), (300, "p1", 0)])
def test_dynamo_credits_a_quarter_of_a_prefix_on_ssd_and_loads_it(dram: int, instance: str, load_tokens: int) -> None:
    candidate = place("dynamo", cluster(0, dram, deep=(800, dram))).chosen  # 1000 - 200 against 850 or 775
    assert (candidate.instance, candidate.load_tokens) == (instance, load_tokens)


@pytest.mark.parametrize(("prefix", "instance"), [(700, "p0"), (600, "p1")])
def test_llm_d_gives_three_for_the_prefix_and_two_for_the_queue(prefix: int, instance: str) -> None:
    assert chosen("llm-d", cluster(prefix, 0, queued=(4, 0))) == instance


@pytest.mark.parametrize(("kv_used", "instance"), [(0.5, "p0"), (0.65, "p1")])
def test_llm_d_gives_two_for_free_kv_memory(kv_used: float, instance: str) -> None:
    assert chosen("llm-d", cluster(400, 0, kv_used=(kv_used, 0.0))) == instance  # 1.2 - 2 * used against 0


def test_llm_d_scales_queues_between_the_shortest_and_the_longest() -> None:
    assert shortness(np.array([10, 15, 20])).tolist() == [1.0, 0.5, 0.0]
    assert shortness(np.array([7, 7])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("loads", "instance"), [((64, 0), "p0"), ((65, 0), "p1"), ((200, 135), "p0"), ((200, 133), "p1")])
def test_sglang_leaves_the_cache_when_loads_are_uneven_by_both_measures(loads: tuple[int, int], instance: str) -> None:
    assert chosen("sglang", cluster(400, 0, queued=loads)) == instance


@pytest.mark.parametrize(("prefix", "instance"), [(301, "p0"), (300, "p1")])
def test_sglang_follows_a_match_above_three_tenths_of_the_prompt(prefix: int, instance: str) -> None:
    assert chosen("sglang", cluster(prefix, 0, queued=(5, 4))) == instance


def test_a_request_that_will_decode_where_it_prefills_counts_once() -> None:
    assert chosen("sglang", cluster(0, 0, queued=(2, 0), batch=(2, 3))) == "p0"


@pytest.mark.parametrize(("load", "instance"), [(16, "p0"), (17, "p1")])
def test_aibrix_leaves_the_cache_when_loads_differ_by_more_than_16(load: int, instance: str) -> None:
    assert chosen("aibrix", cluster(900, 0, queued=(load, 0))) == instance


@pytest.mark.parametrize(("prefix", "instance"), [(101, "p0"), (99, "p1")])
def test_aibrix_lets_a_tenth_of_the_prompt_outweigh_the_whole_load(prefix: int, instance: str) -> None:
    assert chosen("aibrix", cluster(prefix, 0, queued=(16, 0))) == instance  # 8.99 + 1 or 9.01 + 1 against 10


@pytest.mark.parametrize(("others", "instance"), [(3, "p0"), (5, "p1")])
def test_aibrix_passes_over_who_is_busier_than_two_deviations(others: int, instance: str) -> None:
    view = cluster(900, *[0] * others, queued=(16, *[0] * others))  # 16 against 4 + 2 * 6.9 or 2.7 + 2 * 6.0
    assert chosen("aibrix", view) == instance


@pytest.mark.parametrize(("ahead", "instance"), [(700, "p0"), (800, "p1")])
def test_aibrix_conductor_predicts_by_its_own_coefficients(ahead: int, instance: str) -> None:
    view = cluster(900, 0, queued=(1, 0), queued_tokens=(ahead, 0))  # 23.5 or 27.6 + 5.5 + 6 ms against 36.6
    assert chosen("aibrix-conductor", view) == instance


@pytest.mark.parametrize(("queued", "instance"), [(2, "p0"), (3, "p1")])
def test_aibrix_conductor_multiplies_the_count_by_a_mean(queued: int, instance: str) -> None:
    view = cluster(900, 0, queued=(queued, 0), queued_tokens=(700, 0))  # 2 * 11.5 or 3 * 8.6 + 11.5 against 36.6
    assert chosen("aibrix-conductor", view) == instance


@pytest.mark.parametrize(("prefix", "load", "instance"), [(100, 10, "p0"), (99, 10, "p1"), (100, 11, "p1")])
def test_ray_follows_a_tenth_of_the_prompt_while_loads_differ_by_at_most_10(prefix: int, load: int, instance: str) -> None:
    assert chosen("ray", cluster(prefix, 0, queued=(load, 0))) == instance


def test_ray_takes_the_less_loaded_of_two_by_lot() -> None:
    policy, rng, view = POLICIES["ray"](), Random(1), cluster(0, 0, 0, queued=(2, 1, 0))
    assert {policy.place(view, rng).chosen.instance for _ in range(50)} == {"p1", "p2"}


@pytest.mark.parametrize(("prefix", "instance"), [(700, "p0"), (600, "p1")])
def test_production_stack_weighs_the_match_against_load_above_the_mean(prefix: int, instance: str) -> None:
    assert chosen("production-stack", cluster(prefix, 0, queued=(2, 1))) == instance  # a third above, a third below


def test_production_stack_takes_load_relative_to_the_mean() -> None:
    assert chosen("production-stack", cluster(100, 0, queued=(102, 100))) == "p0"  # 0.1 - 0.0099 against 0.0099


def test_dynamo_decodes_where_the_least_kv_is_read() -> None:
    assert decode_by("fewest-tokens", ("d0", 1, 5000, 9000), ("d1", 7, 4000, 1000)) == "d1"


def test_llm_d_decodes_where_nobody_waits_and_then_where_kv_is_free() -> None:
    assert decode_by("llm-d", ("d0", 10, 0, 10_000), ("d1", 8, 5000, 5000)) == "d1"  # 0 + 2 against 2 + 1
    assert decode_by("llm-d", ("d0", 0, 5000, 5000), ("d1", 8, 0, 10_000)) == "d1"  # 2 + 1 against 2 + 2


def test_aibrix_decodes_by_requests_throughput_and_free_kv() -> None:
    four, two = ("d0", 4, 0, 10_000), ("d1", 2, 0, 10_000)
    assert decode_by("aibrix", four, two) == "d1"  # 1 + 1 - 1 against 0.5 + 1 - 167/286
    assert decode_by("aibrix", four, ("d1", 2, 100, 100)) == "d0"  # half as much free KV doubles the score


def test_aibrix_decodes_with_the_fewest_when_batches_differ_by_16() -> None:
    assert decode_by("aibrix", ("d0", 15, 0, 10_000), ("d1", 0, 0, 10_000)) == "d0"  # as published, idle is no better: 1, 1
    assert decode_by("aibrix", ("d0", 16, 0, 10_000), ("d1", 0, 0, 10_000)) == "d1"


def test_aibrix_conductor_decodes_where_throughput_is_high_already() -> None:
    assert decode_by("aibrix-conductor", ("d0", 0, 0, 10_000), ("d1", 4, 0, 10_000)) == "d1"  # 40 against 3.5 * 1.25


def test_aibrix_conductor_reckons_with_the_batch_that_it_would_make() -> None:
    one, four = ("d0", 1, 0, 10_000), ("d1", 4, 50_000, 10_000)
    assert decode_by("aibrix-conductor", one, four) == "d1"  # 11 * 2 against 16 * 1.25


def test_aibrix_conductor_decodes_elsewhere_above_nine_tenths_of_kv() -> None:
    other = ("d1", 3, 0, 10_000)  # 4.3 * 1.33 = 5.8
    assert decode_by("aibrix-conductor", ("d0", 4, 100, 900), other) == "d0"  # 3.5 * 1.25 = 4.4
    assert decode_by("aibrix-conductor", ("d0", 4, 100, 5), other) == "d1"  # half as much again


def test_every_placement_is_a_strategy() -> None:
    assert set(POLICIES) <= set(STRATEGIES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_can_be_built(name: str) -> None:
    row = STRATEGIES[name]
    assert row.name == name
    conductor = row.conductor(ConductorConfig(kv_bytes_per_token=100), COSTS, Slo(), Random(1))
    conductor.check()
    row.batcher(BatcherConfig(max_batch=64), COSTS, Slo()).check()


@pytest.mark.parametrize("name", PEERS)
def test_peers_admit_everything_and_keep_roles_as_they_are(name: str) -> None:
    row = STRATEGIES[name]
    assert (row.placement, row.admission, row.roles, row.replication, row.is_colocated) == (
        name,
        "off",
        "static",
        "none",
        False,
    )


def test_colocated_strategies_decode_where_they_prefill() -> None:
    rows = STRATEGIES["colocated"], STRATEGIES["colocated-chunked"]
    assert all(row.is_colocated and (row.placement, row.decode, row.admission) == ("local", "stay", "off") for row in rows)
    assert rows[0].mixed_tokens == rows[0].chunk_tokens > 1_000_000
    assert (rows[1].mixed_tokens, rows[1].chunk_tokens) == (512, 512)
