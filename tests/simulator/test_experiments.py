"""The papers' figures as experiments: what they simulate, and that figures say what was simulated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvasir.core.errors import ConfigError
from kvasir.core.request import Slo
from kvasir.costs.roofline import RooflineCost
from kvasir.report.plots.svg import svg_of
from kvasir.scheduling.strategy import strategy
from kvasir.simulator.capacity import Capacity
from kvasir.simulator.clusters import with_split
from kvasir.simulator.config import SimConfig
from kvasir.simulator.experiments import EXPERIMENTS, Bed, Column, experiments, long_prompts, overload
from kvasir.simulator.experiments.hit_rate import CAPACITIES, num_blocks
from kvasir.simulator.experiments.tasks import (
    Play,
    Search,
    effective_share,
    mean_ttft_s,
    num_rejected,
    with_dram,
    with_network,
    with_nodes,
    without_sharing,
)
from kvasir.workload.cache_model import lru_hit_rate
from kvasir.workload.source import synthesise


@pytest.fixture(scope="module")
def bed() -> Bed:
    return Bed(synthesise("synthetic:conversation?requests=40&seed=5"))


def test_names_are_those_of_the_table_and_keep_its_order() -> None:
    assert [e.name for e in experiments(["ratio", "hit-rate"])] == ["hit-rate", "ratio"]
    assert [e.name for e in experiments([])] == list(EXPERIMENTS)
    with pytest.raises(ConfigError, match="unknown experiment 'fig5'; known are hit-rate, placement"):
        experiments(["fig5"])


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "long-prompts"])
def test_every_experiment_makes_a_whole_figure(bed: Bed, name: str) -> None:
    experiment = EXPERIMENTS[name]
    figure = experiment.figure(bed, {key: task() for key, task in experiment.tasks(bed).items()})
    assert figure.grids
    for grid in figure.grids:
        assert len({len(column.values) for column in grid.columns}) == 1, grid.title
        assert any("paper" in c.name for g in figure.grids for c in g.columns) or "paper" in figure.deviation
    for title, draw in figure.plots.items():
        assert "nothing to show" not in svg_of(name, draw), title


def test_a_missing_value_is_a_dash() -> None:
    assert Column("paper", [None, 1.5], "{:.2f}").texts() == ["-", "1.50"]


def test_an_unlimited_cache_finds_every_block_that_was_there_before() -> None:
    bed = Bed(synthesise("synthetic:conversation?requests=200&seed=5"))
    assert num_blocks(bed.trace) > CAPACITIES[0]
    by_policy = {name: task() for name, task in EXPERIMENTS["hit-rate"].tasks(bed).items()}
    expected = lru_hit_rate(bed.trace.requests)
    assert expected > 0
    for rates in by_policy.values():
        assert rates[-1].blocks == pytest.approx(expected)
        assert rates[0].blocks < rates[-1].blocks


def test_twice_the_speed_is_half_the_time(bed: Bed) -> None:
    play = Play(bed.trace, bed.cluster(), strategy("least-loaded"))
    slow, fast = play(), replace(play, speed=2.0)()
    assert float(fast.records.arrival_s[-1]) == pytest.approx(float(slow.records.arrival_s[-1]) / 2)
    assert mean_ttft_s(slow) == pytest.approx(float(np.mean(slow.records.ttft_s)))


def test_objectives_can_be_judged_after_the_run(bed: Bed) -> None:
    run = Play(bed.trace, bed.cluster(), strategy("mooncake").with_parts(admission="off"))()
    assert num_rejected(run) == 0
    assert effective_share(run) == 1.0
    assert effective_share(run, Slo(ttft_s=1e-6, tbt_s=0.1)) == 0.0
    assert run.attained.request_share == 1.0


def test_a_trace_without_sharing_has_nothing_to_find(bed: Bed) -> None:
    bare = without_sharing(bed.trace)
    assert [r.input_tokens for r in bare.requests] == [r.input_tokens for r in bed.trace.requests]
    assert lru_hit_rate(bare.requests) == 0.0
    assert Play(bare, bed.cluster(), strategy("mooncake"))().hit_rate == 0.0


def test_clusters_are_changed_where_they_should(bed: Bed) -> None:
    cluster = bed.cluster()
    slow = with_network(cluster, 3e9)
    assert isinstance(slow.costs, RooflineCost)
    assert slow.costs.transfer_s(3_000_000_000) == pytest.approx(1.0)
    assert {node.network_bandwidth for node in slow.nodes} == {3e9}
    assert {node.dram_tokens for node in with_dram(cluster, 1_000).nodes} == {1_000}
    four = with_nodes(cluster, 4)
    assert [i.node for i in four.instances] == [node.id for node in four.nodes]
    assert len(four.nodes) == 4


def test_long_prompts_are_half_cached_and_as_frequent_as_asked() -> None:
    trace = long_prompts.poisson(16_384, every_s=2.0)
    assert {(r.input_tokens, len(r.hash_ids), r.output_tokens) for r in trace.requests} == {(16_384, 32, 512)}
    unseen_documents = long_prompts.NUM_DOCUMENTS / len(trace.requests)
    assert lru_hit_rate(trace.requests) == pytest.approx(0.5 * (1 - unseen_documents), abs=0.01)
    assert trace.span_s / len(trace.requests) == pytest.approx(2.0, rel=0.2)


def test_a_search_finds_a_speed_that_passes_below_one_that_fails() -> None:
    short = replace(long_prompts.poisson(16_384, every_s=2.0), requests=long_prompts.poisson(16_384, 2.0).requests[:30])
    cluster = with_split(with_nodes(Bed(short).cluster("elastic"), 2), "1P1D")
    found = Search(Play(short, cluster, strategy("mooncake"), long_prompts.objectives(0.1)), 0.2)()
    assert found.speed is not None
    assert {p.speed: p.passes for p in found.probes}[found.speed]
    assert any(not p.passes for p in found.probes if p.speed > found.speed)


def test_the_long_prompts_figure_compares_the_better_split(bed: Bed) -> None:
    experiment = EXPERIMENTS["long-prompts"]
    tasks = experiment.tasks(bed)
    assert len(tasks) == len(long_prompts.LENGTHS) * len(long_prompts.SYSTEMS) * len(long_prompts.TBTS_S)
    speeds = {"mooncake 3P1D": 2.0, "mooncake 2P2D": 3.0, "kvasir": 4.0, "colocated": 1.0, "colocated-chunked": 1.5}

    def found(key: str) -> Capacity:
        return Capacity(speeds[key.split(",")[0]], ())

    figure = experiment.figure(bed, {key: found(key) for key in tasks})
    cells = {column.name: column.texts() for column in figure.grids[1].columns}
    assert cells["better split over colocated"] == ["+200%"] * 4
    assert cells["over chunked"] == ["+100%"] * 4
    assert "gains +200% to +200% at TBT 100 ms" in figure.deviation


def test_the_load_of_a_pool_is_that_of_its_instances(bed: Bed) -> None:
    config = SimConfig(sample_s=1.0, num_hot=0)
    run = Play(bed.trace, bed.cluster("15P1D"), strategy("mooncake"), speed=4.0, config=config)()
    load = overload.load_of(run, ttft_s=30.0)
    inside = [s for s in run.samples if load.times_s[0] <= s.at_s <= load.times_s[-1]]
    assert load.decode == [float(s.decode_batch[15]) for s in inside]
    assert load.prefill == pytest.approx([sum(s.wait_s[:15]) / 15 / 30.0 for s in inside])
    assert max(load.decode) > 0
    assert load.times_s[0] >= overload.WARM_UP * run.records.arrival_s[-1]
