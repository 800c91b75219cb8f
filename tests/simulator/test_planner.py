"""The planner's questions against made-up clusters whose answers are known, and its player against real simulations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from msgspec.structs import replace

from kvasir.core.errors import ConfigError, TraceError
from kvasir.core.request import Role, Slo
from kvasir.simulator.clusters import load_cluster
from kvasir.simulator.planner import (
    EXPECTED_QUICK_RUNS,
    EXPECTED_RUNS,
    Advice,
    Answer,
    Event,
    Figures,
    Layout,
    Part,
    Player,
    RunSpec,
    Setting,
    TraceFacts,
    advise,
    facts_of,
    with_nodes_needed,
)
from kvasir.simulator.planner.asking import Asking, answered, smallest_passing, together
from kvasir.simulator.planner.trouble import recovery_s
from kvasir.workload.trace import Trace, TraceRequest

GIB = 2**30
FACTS = TraceFacts(
    num_requests=1000,
    span_s=500.0,
    distinct_tokens=1,
    has_sharing=True,
    unknown_sharing="",
    unknown_times="",
    quiet_start_s=100.0,
    quiet_s=62.5,
    quiet_load=0.5,
)
SETTING = Setting(
    nodes=16, dram_bytes=1024 * GIB, ssd_bytes=0, rate=2.0, working_set_bytes=16 * 1024 * GIB, can_ssd=True, facts=FACTS
)
RUN = SETTING.run


class World:
    """A cluster by formula: a layout serves `per_node` of the target load with each node, and more is served in proportion.

    The best split has three quarters of the nodes prefill. Hits grow with DRAM up to `enough_dram`, and SSDs count in full.
    """

    def __init__(self, *, elastic: float = 0.25, fixed: float = 0.2, colocated: float = 0.1, chunked: float = 0.125):
        self.per_node = {
            Layout.ELASTIC: elastic,
            Layout.FIXED: fixed,
            Layout.COLOCATED: colocated,
            Layout.CHUNKED: chunked,
        }
        self.enough_dram = 256 * GIB
        self.asked: list[RunSpec] = []

    def __call__(self, runs: Sequence[RunSpec]) -> list[Figures]:
        self.asked += runs
        return [self.figures(run) for run in runs]

    def figures(self, run: RunSpec) -> Figures:
        serves = self.per_node[run.layout] * run.nodes
        if run.layout is Layout.FIXED:
            serves *= 1 - abs(run.num_prefill / run.nodes - 0.75)
        load = run.load * (FACTS.quiet_load if run.part is Part.QUIET else 1.0)
        share = min(1.0, 0.9 * serves / load)
        hits = 0.4 * min(1.0, (run.dram_bytes + run.ssd_bytes) / self.enough_dram)
        bins: tuple[float, ...] = (share,) * 10
        if run.event is not Event.NONE:
            bins = (1.0,) * 5 + (0.5, 0.7) + (1.0,) * 3
        return Figures(
            requests=1000,
            effective_requests=share,
            effective_input_tokens=share,
            rejected=round((1 - share) * 1000),
            failed=0,
            hit_rate=hits,
            prefill_s_per_request=1.0 - hits,
            ttft_p90_s=10.0 / serves,
            tbt_p90_s=None,
            event_s=250.0,
            bin_s=50.0,
            effective_over_time=bins,
        )


def answers(advice: Advice) -> dict[str, Answer]:
    return {answer.key: answer for answer in advice.answers}


@pytest.mark.parametrize("nodes", [1, 2, 3, 16, 100])
@pytest.mark.parametrize("quick", [False, True])
def test_a_plan_takes_about_as_many_runs_as_it_says_and_none_twice(nodes: int, quick: bool) -> None:
    world = World(elastic=4.0 / nodes, fixed=3.2 / nodes)
    advice = advise(replace(SETTING, nodes=nodes, is_quick=quick), world)
    assert len(world.asked) == len(set(world.asked)) == len(advice.runs)
    assert len(world.asked) <= (EXPECTED_QUICK_RUNS if quick else EXPECTED_RUNS) * 1.15


def test_every_answer_shows_the_runs_behind_it_and_they_were_made() -> None:
    advice = advise(SETTING, World())
    assert list(answers(advice)) == ["disaggregate", "ratio", "memory", "nodes", "trouble", "parking"]
    for answer in advice.answers:
        assert len(answer.rows) == len(answer.runs) > 0
        assert all(len(row) == len(answer.header) for row in answer.rows)
        assert set(answer.runs) <= set(advice.runs)
        assert answer.text.endswith(".")


def test_capacities_are_found_to_a_step_of_the_grid() -> None:
    found = answers(advise(SETTING, World()))["disaggregate"].values["capacity_load"]
    truth = {"elastic": 4.0, "12P4D": 3.2, "colocated": 1.6, "colocated-chunked": 2.0}
    assert found.keys() == truth.keys()
    for name, load in truth.items():
        assert load / 2 ** (1 / 8) < found[name] <= load * 1.001


@pytest.mark.parametrize(
    ("world", "verdict", "advice"),
    [
        (World(), "Disaggregate: elastic roles serve 4x", "Let roles follow the load"),
        (World(fixed=0.4), "Disaggregate: ", "Fix 12P4D"),
        (World(chunked=0.4), "Do not: ", "Let roles follow the load"),
        (World(chunked=0.25), "It makes little difference", "Let roles follow the load"),
        (World(elastic=1e-4, fixed=1e-4, colocated=1e-4, chunked=1e-4), "On 16 nodes nothing serves", "Let roles"),
        (World(elastic=9.0), "elastic roles serve at least 16x", "Let roles follow the load"),
    ],
)
def test_the_verdict_follows_the_capacities(world: World, verdict: str, advice: str) -> None:
    found = answers(advise(SETTING, world))
    assert verdict in found["disaggregate"].text
    assert found["ratio"].text.startswith(advice)


def test_the_best_split_is_found_from_coarse_to_fine() -> None:
    world = World()
    found = answers(advise(replace(SETTING, nodes=32), world))["ratio"]
    tried = [run.num_prefill for run in found.runs if run.layout is Layout.FIXED]
    assert found.values["best_split"] == "24P8D"
    assert {8, 16, 24, 20, 28, 22, 26} <= set(tried)
    assert len(tried) < 12


def test_the_knee_is_the_smallest_size_that_has_most_of_the_hits() -> None:
    values = answers(advise(SETTING, World()))["memory"].values
    assert values["knee_dram_bytes_per_node"] == 256 * GIB
    by_size = {step["to_dram_bytes_per_node"]: step for step in values["marginal"]}
    assert by_size[256 * GIB]["hit_points_per_gib_per_node"] == pytest.approx(20 / 128)
    assert by_size[256 * GIB]["prefill_s_saved_per_gib_per_node"] == pytest.approx(0.2 * 1000 / 128)
    assert by_size[256 * GIB]["prefill_s_saved_per_gib_in_all"] == pytest.approx(0.2 * 1000 / 128 / 16)
    assert by_size[512 * GIB]["hit_points_per_gib_per_node"] == 0


def test_ssds_are_tried_behind_a_quarter_of_the_knee_and_behind_the_knee() -> None:
    runs = answers(advise(SETTING, World()))["memory"].runs
    assert [(run.dram_bytes // GIB, run.ssd_bytes // GIB) for run in runs if run.ssd_bytes] == [
        (64, 256),
        (64, 1024),
        (256, 1024),
    ]
    without = answers(advise(replace(SETTING, can_ssd=False), World()))["memory"]
    assert not any(run.ssd_bytes for run in without.runs)
    assert "SSD bandwidth is not known" in without.text


def test_a_trace_without_sharing_gets_no_memory_runs_and_is_told_why() -> None:
    silent = replace(FACTS, has_sharing=False, unknown_sharing="prefix sharing: no hash_ids")
    found = answers(advise(replace(SETTING, facts=silent), World()))["memory"]
    assert found.runs == ()
    assert found.text.startswith("Not known (prefix sharing: no hash_ids)")
    unshared = answers(advise(replace(SETTING, facts=replace(FACTS, has_sharing=False)), World()))["memory"]
    assert unshared.text.startswith("Nothing: no two prompts")


def test_what_a_trace_does_not_say_is_said_beside_the_answer() -> None:
    vague = replace(FACTS, unknown_sharing="prefix sharing: within a conversation only", unknown_times="arrival times: drawn")
    found = answers(advise(replace(SETTING, facts=vague), World()))
    assert "Lower bounds (prefix sharing: within a conversation only)" in found["memory"].text
    assert found["memory"].values["is_lower_bound"] is True
    assert "But arrival times: drawn." in found["parking"].text


def test_the_fewest_nodes_pass_and_one_fewer_fails() -> None:
    advice = advise(SETTING, World())
    needed = answers(advice)["nodes"].values["nodes_needed"]
    assert needed == {"0.5x": 2, "1x": 4, "2x": 8}
    assert not advice.runs[replace(RUN, nodes=3)].passes
    parking = answers(advice)["parking"]
    assert (parking.values["nodes_needed_at_quarter_load"], parking.values["nodes_needed_in_quiet_stretch"]) == (1, 2)
    assert "15 of the 16 nodes can be parked" in parking.text


def test_a_load_that_no_number_of_nodes_serves_is_no_number() -> None:
    hopeless = World(elastic=0.0001)
    found = answers(advise(SETTING, hopeless))["nodes"]
    assert found.values["nodes_needed"]["1x"] is None
    assert "is not served by 512 nodes" in found.text
    with pytest.raises(ConfigError, match="nodes do not serve 2 requests/s"):
        with_nodes_needed(SETTING, hopeless)


def test_without_a_number_of_nodes_the_load_decides() -> None:
    assert with_nodes_needed(replace(SETTING, nodes=5), World(elastic=0.1)).nodes == 10


def test_trouble_is_tried_on_the_cluster_and_on_the_fewest_nodes() -> None:
    found = answers(advise(SETTING, World()))["trouble"]
    events = {(event["event"], event["nodes"]): event for event in found.values["events"]}
    assert set(events) == {("node-dies", 16), ("node-dies", 4), ("surge", 16), ("surge", 4)}
    assert events["node-dies", 16]["recovery_s"] == 7 * 50.0 - 250.0
    alone = answers(advise(replace(SETTING, nodes=1), World(elastic=1.0)))["trouble"]
    assert "The only node must not die" in alone.text
    assert all(event["event"] == "surge" for event in alone.values["events"])


def over_time(*shares: float | None) -> Figures:
    return replace(World().figures(RUN), effective_over_time=shares, bin_s=10.0, event_s=15.0)


def test_recovery_ends_with_the_last_part_that_is_worse_than_the_undisturbed_run_ever_is() -> None:
    calm = over_time(1.0, 0.85, 1.0, 1.0)
    assert recovery_s(over_time(1.0, 0.2, 0.6, 0.87), calm) == 15.0  # 0.87 happens undisturbed
    assert recovery_s(over_time(1.0, 1.0, None, 1.0), calm) == 0.0
    assert recovery_s(over_time(0.1, 1.0, 1.0, 1.0), calm) == 0.0  # before the event
    assert recovery_s(over_time(1.0, 1.0, 1.0, 0.2), calm) is None


@pytest.mark.parametrize("edge", [1, 2, 7, 8, 50])
@pytest.mark.parametrize("start", [1, 6, 50])
def test_a_search_finds_the_edge_from_anywhere(edge: int, start: int) -> None:
    def evaluate(runs: Sequence[RunSpec]) -> list[Figures]:
        shares = [float(run.nodes >= edge) for run in runs]
        return [replace(World().figures(RUN), effective_requests=s, effective_input_tokens=s) for s in shares]

    def run_at(nodes: int) -> RunSpec:
        return replace(RUN, nodes=nodes)

    found = answered(smallest_passing(run_at, start=start, lowest=1, highest=50), evaluate, {})
    assert found.number == edge
    assert [run.nodes for run in found.runs] == sorted({run.nodes for run in found.runs})
    assert len(found.runs) <= 13


def test_questions_asked_together_share_runs_and_rounds() -> None:
    rounds: list[Sequence[RunSpec]] = []

    def evaluate(runs: Sequence[RunSpec]) -> list[Figures]:
        rounds.append(runs)
        return World()(runs)

    def wants(*loads: float) -> Asking[float]:
        total = 0.0
        for load in loads:
            run = replace(RUN, load=load)
            total += (yield [run])[run].effective
        return total

    found = answered(together(wants(1.0, 2.0, 8.0), wants(2.0), wants()), evaluate, {})
    assert found == pytest.approx([1.0 + 1.0 + 0.45, 1.0, 0.0])
    assert [sorted(run.load for run in runs) for runs in rounds] == [[1.0, 2.0], [8.0]]  # 2x was known by the second


# --- the trace's facts and the player --------------------------------------------------------------------------------------


def request(at_s: float, tokens: int = 1000, *ids: int) -> TraceRequest:
    return TraceRequest(at_s, tokens, 20, ids or (int(at_s * 1000), int(at_s * 1000) + 500_000))


def steady(count: int, every_s: float = 1.0, tokens: Callable[[int], int] = lambda n: 1000) -> Trace:
    return Trace(tuple(request(n * every_s, tokens(n)) for n in range(count)))


def player(trace: Trace, **changes: object) -> Player:
    base = load_cluster('name = "one"\nmodel = "qwen3-8b"\nhardware = "h800"\nnodes = 1\nsplit = "elastic"')
    return Player(trace, facts_of(trace), base, Slo(30.0, 0.1), 1.0, (6e9, 5e9))


def test_the_quietest_stretch_is_the_one_with_the_fewest_tokens() -> None:
    facts = facts_of(steady(81, tokens=lambda n: 600 if 40 <= n < 50 else 1000))
    assert (facts.quiet_start_s, facts.quiet_s) == (40.0, 10.0)
    assert facts.quiet_load == pytest.approx(600 / 1000, rel=0.1)
    assert facts.rate == 81 / 80


def test_sharing_is_seen_in_the_blocks() -> None:
    assert facts_of(steady(10)).has_sharing is False
    shared = facts_of(Trace((request(0.0, 1000, 1, 2), request(1.0, 1000, 1, 3))))
    assert (shared.has_sharing, shared.distinct_tokens) == (True, 3 * 512)


def test_a_trace_without_time_has_no_load() -> None:
    with pytest.raises(TraceError, match="all requests of the trace arrive at one time"):
        facts_of(Trace((request(1.0), request(1.0))))


def test_a_run_s_cluster_has_its_nodes_memory_and_roles() -> None:
    run = RunSpec(nodes=12, dram_bytes=100 * GIB, ssd_bytes=50 * GIB, layout=Layout.FIXED, num_prefill=9)
    made = player(steady(10))
    cluster = made.cluster(run)
    assert [node.id for node in cluster.nodes[:2]] == ["n00", "n01"]
    assert {node.dram_tokens for node in cluster.nodes} == {100 * GIB // cluster.kv_bytes_per_token}
    assert {(node.ssd_read_bandwidth, node.ssd_write_bandwidth) for node in cluster.nodes} == {(6e9, 5e9)}
    assert [i.role for i in cluster.instances] == [Role.PREFILL] * 9 + [Role.DECODE] * 3
    assert made.cluster(replace(run, ssd_bytes=0)).nodes[0].ssd_read_bandwidth == 0
    assert {i.role for i in made.cluster(replace(run, layout=Layout.CHUNKED)).instances} == {Role.MIXED}
    assert made.cluster(RunSpec(nodes=1, dram_bytes=GIB)).instances[0].role is Role.MIXED


def test_a_surge_doubles_the_rate_in_the_middle_and_nowhere_else() -> None:
    made = player(steady(101))
    times = [r.arrival_s for r in made.trace_of(replace(RUN, event=Event.SURGE)).requests]
    gaps = [b - a for a, b in pairwise(times)]
    assert gaps == pytest.approx([1.0] * 40 + [0.5] * 20 + [1.0] * 40)


def test_load_and_part_choose_the_trace() -> None:
    made = player(steady(81, tokens=lambda n: 600 if 40 <= n < 50 else 1000))
    assert made.trace_of(replace(RUN, load=2.0)).span_s == 40.0
    quiet = made.trace_of(replace(RUN, part=Part.QUIET))
    assert [r.input_tokens for r in quiet.requests] == [600] * 10


def test_a_dead_node_and_a_surge_are_worse_than_none_and_equal_runs_are_equal() -> None:
    made = player(steady(160, every_s=0.05, tokens=lambda n: 1000))
    calm, dead, surge = (made.play(RunSpec(nodes=2, dram_bytes=GIB, event=event)) for event in Event)
    assert calm.passes
    assert calm.requests == dead.requests == surge.requests == 160
    assert dead.ttft_p90_s is not None
    assert calm.ttft_p90_s is not None
    assert dead.ttft_p90_s > calm.ttft_p90_s
    assert dead.event_s == pytest.approx(0.5 * 159 * 0.05)
    assert surge.event_s == pytest.approx(0.5 * 159 * 0.05)  # 0.4 before it, and 0.2 at twice the speed
    assert len(calm.effective_over_time) == 4
    assert math.isclose(sum(s or 0.0 for s in calm.effective_over_time) / 4, calm.effective_requests, abs_tol=0.02)
    assert made.play(RunSpec(nodes=2, dram_bytes=GIB, event=Event.NODE_DIES)) == dead
