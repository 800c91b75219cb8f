"""Prefill over several nodes: chunked pipelines, fetched prefixes, replicas. A script says what the Conductor would."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from kvasir.core import commands as cmd
from kvasir.core.commands import Candidate, Command, Decision
from kvasir.core.events import Arrived, BlocksRemoved, BlocksStored, Event, Failed, Finished, PrefillDone
from kvasir.core.keys import BlockKey
from kvasir.core.request import FinishReason, Request, Role, Slo
from kvasir.core.tier import Tier
from kvasir.scheduling.strategy import strategy
from kvasir.simulator import SimConfig, Simulation
from kvasir.simulator.faults import Fault, FaultKind
from kvasir.simulator.run import Run
from kvasir.simulator.spec import ClusterSpec, MemoryKind
from kvasir.workload.trace import Trace
from tests.simulator.tiny import FLAT, cluster, play, trace

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


class Script:
    """Stands for the Conductor: answers Arrived by a plan, and hands off to the planned decode instance."""

    def __init__(self, plans: list[Candidate], decode: str, also: Callable[[Event], list[Command]] = lambda event: []):
        self._plans = plans
        self._decode = decode
        self._also = also
        self.events: list[tuple[float, Event]] = []
        self.prefilled: dict[str, str] = {}

    def handle(self, event: Event, now: float) -> list[Command]:
        self.events.append((now, event))
        if isinstance(event, Arrived):
            plan = self._plans.pop(0)
            decision = Decision(event.request.id, "script", now)
            return [cmd.Prefill(event.request.id, plan.instance, self._decode, plan, decision)]
        if isinstance(event, PrefillDone) and event.instance != self._decode:
            return [cmd.Decode(event.request_id, self._decode, event.instance)]
        return self._also(event)

    def arrived(self, request: Request, now: float) -> list[Command]:
        return self.handle(Arrived(request), now)

    def prefill_done(self, request_id: str, instance: str, now: float) -> list[Command]:
        return self.handle(PrefillDone(request_id, instance, 0), now)

    def finished(self, request_id: str, instance: str, output_tokens: int, now: float) -> list[Command]:
        return self.handle(Finished(request_id, instance, FinishReason.LENGTH, output_tokens), now)

    def blocks_stored(self, node: str, seq: int, keys: tuple[BlockKey, ...], tier: Tier, now: float) -> list[Command]:
        return self.handle(BlocksStored(node, seq, keys, tier), now)

    def blocks_removed(self, node: str, seq: int, keys: tuple[BlockKey, ...], tier: Tier, now: float) -> list[Command]:
        return self.handle(BlocksRemoved(node, seq, keys, tier), now)

    def wants_report(self, instance: str, epoch: int) -> bool:
        return False


def scripted(
    played: Trace,
    spec: ClusterSpec,
    script: Script,
    *,
    chunk_tokens: int = 1 << 20,
    layerwise: bool = True,
    faults: tuple[Fault, ...] = (),
) -> Run:
    chosen = replace(strategy("mooncake"), chunk_tokens=chunk_tokens)
    config = SimConfig(layerwise=layerwise, sample_s=0)
    simulation = Simulation(played, spec, chosen, slo=Slo(), config=config, faults=faults)
    simulation.hub.attach(script)  # type: ignore[arg-type]
    run = simulation.run()
    for instance in simulation.hub.instances.values():
        instance.batcher.check()
        assert not instance.sequences
    for node in simulation.hub.nodes.values():
        node.pool.check()
        assert (node.pool.stats().leases, node.pool.stats().leased) == (0, 0)
    return run


def plan(
    instance: str, prefix: int = 0, *, source: str | None = None, fetch: int = 0, group: tuple[str, ...] = ()
) -> Candidate:
    return Candidate(instance, 0.0, 0.0, 0.0, prefix, fetch, source, group=group)


def test_four_stages_compute_four_chunks_in_seven_quarters_of_a_chunk() -> None:
    spec = cluster([P] * 4, costs=FLAT)
    script = Script([plan("i3", group=("i0", "i1", "i2", "i3"))], decode="i3")
    run = scripted(trace((0.0, 400, 3, (1, 2, 3, 4))), spec, script, chunk_tokens=100)
    assert run.records.ttft_s[0] == pytest.approx(7 * 0.025)
    assert run.records.end_s[0] == pytest.approx(7 * 0.025 + 2 * 0.02)
    assert run.prefill_s == pytest.approx(0.4)
    stored = [(event.node, len(event.keys)) for _, event in script.events if isinstance(event, BlocksStored)]
    assert stored == [("n3", 1)] * 4  # the last stage's node has the KV of all layers


def test_a_pipeline_hands_off_like_a_single_instance() -> None:
    spec = cluster([P, P, D], costs=FLAT)
    script = Script([plan("i1", group=("i0", "i1"))], decode="i2")
    run = scripted(trace((0.0, 200, 3, (1, 2))), spec, script, chunk_tokens=100)
    assert run.records.ttft_s[0] == pytest.approx(3 * 0.05)
    assert run.records.end_s[0] == pytest.approx(3 * 0.05 + 0.002 + 2 * 0.02)


def test_a_pipeline_computes_only_what_is_not_cached() -> None:
    spec = cluster([P, P], costs=FLAT)
    plans = [plan("i1"), plan("i1", 200, group=("i0", "i1"))]
    run = scripted(trace((0.0, 250, 1, (1, 2, 3)), (1.0, 400, 1, (1, 2, 4, 5))), spec, Script(plans, "i1"), chunk_tokens=100)
    assert run.records.cached_tokens.tolist() == [0, 200]
    assert run.records.ttft_s[1] == pytest.approx(3 * 0.05)


def test_stages_that_share_their_pages_store_when_all_layers_are_there() -> None:
    spec = cluster([P, P, D], costs=FLAT, memory=MemoryKind.SHARED, same_node=True)
    script = Script([plan("i1", group=("i0", "i1"))], decode="i2")
    run = scripted(trace((0.0, 400, 3, (1, 2, 3, 4))), spec, script, chunk_tokens=100)
    assert run.records.ttft_s[0] == pytest.approx(5 * 0.05)
    stored = [(round(at, 9), len(event.keys)) for at, event in script.events if isinstance(event, BlocksStored)]
    assert stored == [(4 * 0.05, 3), (5 * 0.05, 1)]  # the first stage is through at 0.2 s


def test_a_pipeline_that_finds_no_room_for_its_prompt_fails() -> None:
    spec = cluster([P, P, D], costs=FLAT, memory=MemoryKind.SHARED, same_node=True, kv_tokens=500, dram_tokens=500)
    failed: list[Event] = []

    def again(event: Event) -> list[Command]:
        if not isinstance(event, Failed):
            return []
        failed.append(event)
        return [cmd.Fail(event.request_id, "script", "enough")]

    script = Script([plan("i1", group=("i0", "i1"))], "i2", again)
    scripted(trace((0.0, 600, 3, (1, 2, 3, 4, 5, 6))), spec, script, chunk_tokens=100)
    assert [event.error for event in failed if isinstance(event, Failed)] == ["its node has no room for a pipeline"]


def test_a_fetch_without_overlap_comes_before_the_prefill() -> None:
    spec = cluster([M, M], costs=FLAT)
    plans = [plan("i1"), plan("i0", 200, source="n1", fetch=200)]
    run = scripted(trace((0.0, 250, 1, (1, 2, 3)), (1.0, 350, 1, (1, 2, 4, 5))), spec, Script(plans, "i1"), layerwise=False)
    assert run.records.cached_tokens.tolist() == [0, 200]
    assert run.records.ttft_s[1] == pytest.approx(0.02 + 0.15)


def test_a_layerwise_fetch_that_is_faster_than_compute_is_hidden() -> None:
    plans = [plan("i1"), plan("i0", 200, source="n1", fetch=200)]
    run = scripted(
        trace((0.0, 250, 1, (1, 2, 3)), (1.0, 350, 1, (1, 2, 4, 5))), cluster([M, M], costs=FLAT), Script(plans, "i1")
    )
    assert run.records.ttft_s[1] == pytest.approx(0.15)


def test_a_layerwise_fetch_that_is_slower_than_compute_ends_one_layer_before_the_prefill() -> None:
    """1,000 tokens take 100 ms to come, the other 50 take 50 ms to compute, 5 ms a layer."""
    ids = tuple(range(1, 11))
    plans = [plan("i1"), plan("i0", 1000, source="n1", fetch=1000)]
    run = scripted(trace((0.0, 1000, 1, ids), (2.0, 1050, 1, (*ids, 77))), cluster([M, M], costs=FLAT), Script(plans, "i1"))
    assert run.records.ttft_s[1] == pytest.approx(0.1 + 0.005)


def test_a_fetch_does_not_block_others() -> None:
    ids = tuple(range(1, 11))
    plans = [plan("i1"), plan("i0", 1000, source="n1", fetch=1000), plan("i0")]
    run = scripted(
        trace((0.0, 1000, 1, ids), (2.0, 1050, 1, (*ids, 77)), (2.0, 50, 1, (99,))),
        cluster([M, M], costs=FLAT),
        Script(plans, "i1"),
        layerwise=False,
    )
    assert run.records.ttft_s[2] == pytest.approx(0.05)
    assert run.records.ttft_s[1] == pytest.approx(0.15)


def test_a_fetch_whose_source_dies_is_computed_instead() -> None:
    ids = tuple(range(1, 11))
    plans = [plan("i1"), plan("i0", 1000, source="n1", fetch=1000)]
    run = scripted(
        trace((0.0, 1000, 1, ids), (2.0, 1050, 1, (*ids, 77))),
        cluster([M, M], costs=FLAT),
        Script(plans, "i1"),
        layerwise=False,
        faults=(Fault(2.03, FaultKind.NODE, "n1", 1.0),),
    )
    assert run.records.cached_tokens[1] == 0
    assert run.records.ttft_s[1] == pytest.approx(0.03 + 1.05)


def test_a_replica_is_stored_when_its_bytes_have_arrived() -> None:
    played = trace((0.0, 250, 1, (1, 2, 3)), (1.0, 50, 1, (9,)))

    def replicate(event: Event) -> list[Command]:
        if isinstance(event, Finished) and event.request_id == "r0":
            return [cmd.Replicate("n0", "n1", tuple(i.to_bytes(16, "little") for i in (1, 2)))]
        return []

    script = Script([plan("i0"), plan("i0")], "i0", replicate)
    scripted(played, cluster([M, M], costs=FLAT), script)
    stored = [(now, event.keys) for now, event in script.events if isinstance(event, BlocksStored) and event.node == "n1"]
    assert [len(keys) for _, keys in stored] == [2]
    assert stored[0][0] == pytest.approx(0.25 + 0.02)


def test_the_scheduler_itself_fetches_a_long_prefix() -> None:
    ids = tuple(range(1, 21))
    requests = [(0.0, 2000, 2, ids), *((3.0, 2500, 2, (*ids, *range(100 * i, 100 * i + 5))) for i in range(1, 4))]
    run = play(trace(*requests), cluster([P, P, P, D], costs=FLAT))
    assert run.counters["fetches"] >= 1
    assert run.records.cached_tokens.tolist()[1:] == [2000] * 3
