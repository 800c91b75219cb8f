"""The Conductor, one rule a test: an event goes in, commands come out."""

from random import Random

import pytest
from msgspec.structs import replace

from kvasir.core.commands import Cancel, Command, Decode, Fail, Prefill, Reject, Resync
from kvasir.core.errors import InvariantError
from kvasir.core.events import (
    Aborted,
    Arrived,
    BlocksRemoved,
    BlocksStored,
    Event,
    Failed,
    Finished,
    Heartbeat,
    InstanceInfo,
    InstanceJoined,
    InstanceLoad,
    InstanceLost,
    Inventory,
    NodeLost,
    PrefillDone,
    StepDone,
    Tick,
)
from kvasir.core.request import FinishReason, Request, Role, Slo
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.report.slo import ScaledSlo
from kvasir.scheduling.admission import ADMISSIONS, Admission, Off, SloAdmission
from kvasir.scheduling.conductor import Conductor
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.placer import Rules
from kvasir.scheduling.policies import POLICIES, LeastLoaded, Mooncake, Placement

COSTS = FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 1e-3, 0), 0.0, 1e9)  # 1 ms a prompt token
KEYS = tuple(bytes([i]) * 16 for i in range(20))
CONFIG = ConductorConfig(kv_bytes_per_token=1000, block_tokens=100, max_queued=8, expected_output_tokens=50)


def instance(
    name: str, role: Role, *, node: str | None = None, epoch: int = 1, kv: int = 10_000, batch: int = 8
) -> InstanceInfo:
    return InstanceInfo(name, role, node or f"node-{name}", epoch, kv, batch)


def request(name: str, tokens: int = 1000, *, output: int = 100, keys: tuple[bytes, ...] = (), at: float = 0.0) -> Request:
    return Request(name, tokens, output, keys, at)


class Cluster:
    """Two prefill and two decode instances, one node each; checks invariants after every event."""

    def __init__(
        self,
        *infos: InstanceInfo,
        policy: Placement | None = None,
        admission: Admission | None = None,
        config: ConductorConfig = CONFIG,
    ):
        self.conductor = Conductor(
            config, COSTS, rules=Rules(policy or Mooncake(), admission or Off()), slo=Slo(), rng=Random(0)
        )
        for info in infos or (
            *(instance(f"p{i}", Role.PREFILL) for i in (0, 1)),
            *(instance(f"d{i}", Role.DECODE) for i in (0, 1)),
        ):
            self(InstanceJoined(info))

    def __call__(self, event: Event, now: float = 0.0) -> list[Command]:
        commands = self.conductor.handle(event, now)
        self.conductor.check()
        return commands

    def arrive(self, name: str, tokens: int = 1000, *, keys: tuple[bytes, ...] = (), now: float = 0.0) -> Prefill:
        (command,) = self(Arrived(request(name, tokens, keys=keys, at=now)), now)
        assert isinstance(command, Prefill), command
        return command


def test_a_request_is_prefilled_handed_over_decoded_and_forgotten() -> None:
    cluster = Cluster()
    prefill = cluster.arrive("r")
    assert (prefill.instance, prefill.decode) == ("p0", "d0")
    assert cluster(PrefillDone("r", "p0", 0), 1.0) == [Decode("r", "d0", "p0")]
    assert cluster(Finished("r", "d0", FinishReason.STOP, 5), 2.0) == []
    assert cluster.conductor.num_requests == 0
    assert cluster.conductor.counters["finished"] == 1


def test_a_decision_tells_where_and_why_with_the_numbers() -> None:
    decision = Cluster().arrive("r").decision
    assert (decision.policy, decision.chosen, decision.decode) == ("mooncake", "p0", "d0")
    assert decision.ttft_s == pytest.approx(1.0)
    assert decision.tbt_s == pytest.approx(0.011)
    assert [c.instance for c in decision.candidates] == ["p0", "p1"]
    assert decision.reason == (
        "prefill on p0 by least TTFT by Algorithm 1 among 2: wait 0 s + prefill 1 s after 0 cached tokens = TTFT 1 s;"
        " decode on d0 at TBT 11 ms in a batch of 1"
    )


def test_a_burst_spreads_because_what_was_sent_counts_at_once() -> None:
    cluster = Cluster()
    placed = [cluster.arrive(f"r{i}") for i in range(4)]
    assert [p.instance for p in placed] == ["p0", "p1", "p0", "p1"]
    assert [p.decode for p in placed] == ["d0", "d1", "d0", "d1"]
    assert placed[3].candidate.wait_s == pytest.approx(1.0)


def test_waiting_time_passes_and_ends_with_the_prefill() -> None:
    cluster = Cluster(instance("p0", Role.PREFILL), instance("d0", Role.DECODE))
    cluster.arrive("a")
    assert cluster.arrive("b", now=0.4).candidate.wait_s == pytest.approx(0.6)
    cluster(PrefillDone("a", "p0", 0), 0.9)
    assert cluster.arrive("c", now=0.9).candidate.wait_s == pytest.approx(1.0)


def test_a_prefill_that_takes_longer_than_predicted_does_not_make_the_next_one_shorter() -> None:
    cluster = Cluster(instance("p0", Role.PREFILL), instance("d0", Role.DECODE))
    cluster.arrive("a")
    cluster.arrive("b")
    assert cluster.arrive("c", now=5.0).candidate.wait_s == pytest.approx(1.0)


def test_predictions_follow_what_the_instances_measure() -> None:
    cluster = Cluster()
    cluster.arrive("before", now=0.0)
    cluster(Heartbeat("p0", 1, InstanceLoad(waiting_tokens=1000, prefill_scale=5.0)), 0.0)
    cluster(Heartbeat("p1", 1, InstanceLoad(prefill_scale=1.0)), 0.0)
    cluster(Heartbeat("d0", 1, InstanceLoad(decode_scale=2.0, prefill_scale=50.0)), 0.0)  # d1 has not measured anything
    cluster(Tick(), 0.0)
    placed = cluster.arrive("r")
    assert placed.instance == "p1"
    assert placed.decision.ttft_s == pytest.approx(3.0)
    assert placed.decision.tbt_s == pytest.approx(0.022)
    waits = {c.instance: c.wait_s for c in placed.decision.candidates}
    assert waits["p0"] == pytest.approx(3.0)  # what was sent before takes longer, too
    cluster(InstanceLost("p0", 1), 0.0)
    cluster(Tick(), 0.0)
    assert cluster.arrive("later", 2000).candidate.prefill_s == pytest.approx(2.0)


def test_a_heartbeat_corrects_what_is_left_to_do() -> None:
    cluster = Cluster(instance("p0", Role.PREFILL), instance("d0", Role.DECODE))
    cluster.arrive("a")
    cluster.arrive("b")
    cluster(Heartbeat("p0", 1, InstanceLoad(waiting_tokens=500)), 1.0)
    assert cluster.arrive("c", now=1.0).candidate.wait_s == pytest.approx(0.5)


def test_a_prediction_long_overdue_is_dropped() -> None:
    cluster = Cluster(instance("p0", Role.PREFILL), instance("d0", Role.DECODE))
    cluster.arrive("a")
    cluster(Tick(), 62.0)
    assert cluster.conductor.counters["expired_predictions"] == 1
    assert cluster.arrive("b", now=62.0).candidate.wait_s == 0.0
    assert cluster(PrefillDone("a", "p0", 0), 63.0) == [Decode("a", "d0", "p0")]


def test_the_cached_prefix_of_a_node_attracts_its_prompt() -> None:
    cluster = Cluster()
    cluster(BlocksStored("node-p1", 1, KEYS[:5]))
    prefill = cluster.arrive("r", keys=KEYS[:10])
    assert (prefill.instance, prefill.candidate.prefix_tokens, prefill.candidate.fetch_tokens) == ("p1", 500, 0)


def test_at_least_one_token_of_a_fully_cached_prompt_is_computed() -> None:
    cluster = Cluster()
    cluster(BlocksStored("node-p0", 1, KEYS[:10]))
    assert cluster.arrive("r", 1000, keys=KEYS[:10]).candidate.prefix_tokens == 900


def test_a_mixed_instance_keeps_its_request_without_a_hand_off() -> None:
    cluster = Cluster(instance("m0", Role.MIXED), instance("m1", Role.MIXED))
    prefill = cluster.arrive("r")
    assert prefill.instance == prefill.decode == "m0"
    assert cluster(PrefillDone("r", "m0", 0)) == []
    assert cluster(Aborted("r")) == [Cancel("r", "m0")]


def test_an_abort_cancels_whoever_holds_the_request() -> None:
    cluster = Cluster()
    for name in ("a", "b"):
        cluster.arrive(name)
    assert cluster(Aborted("a")) == [Cancel("a", "p0")]
    cluster(PrefillDone("b", "p1", 0))
    assert cluster(Aborted("b")) == [Cancel("b", "d1")]
    assert cluster(Aborted("b")) == []


def test_late_and_stale_events_are_counted_and_ignored() -> None:
    cluster = Cluster()
    cluster.arrive("r")
    assert cluster(PrefillDone("gone", "p0", 0)) == cluster(PrefillDone("r", "p1", 0)) == []
    cluster(PrefillDone("r", "p0", 0))
    assert cluster(Finished("r", "p0", FinishReason.STOP, 1)) == []
    assert (cluster.conductor.counters["late_events"], cluster.conductor.counters["stale_events"]) == (1, 2)


def test_a_request_that_ends_with_its_first_token_never_decodes() -> None:
    cluster = Cluster()
    cluster.arrive("r")
    assert cluster(Finished("r", "p0", FinishReason.STOP, 1)) == []
    assert cluster.conductor.num_requests == 0


def test_without_an_instance_for_each_phase_a_request_fails() -> None:
    cluster = Cluster(instance("p0", Role.PREFILL))
    assert not cluster.conductor.ready
    assert cluster(Arrived(request("r"))) == [Fail("r", "no_instance", "no decode instance is up")]
    cluster(InstanceJoined(instance("d0", Role.DECODE)))
    assert cluster.conductor.ready


def test_a_request_that_no_instance_can_ever_hold_is_rejected_for_good() -> None:
    (reject,) = Cluster()(Arrived(request("r", 9_950, output=100)))
    assert isinstance(reject, Reject)
    assert (reject.code, reject.retry_after_s) == ("too_large", 0.0)
    assert "10050 tokens" in reject.decision.reason


def test_a_full_queue_rejects_until_the_first_instance_has_drained() -> None:
    cluster = Cluster()
    for i in range(8):
        cluster.arrive(f"r{i}", 100)
    (reject,) = cluster(Arrived(request("r")))
    assert isinstance(reject, Reject)
    assert reject.code == "queue_full"
    assert reject.retry_after_s == pytest.approx(0.4)


def test_a_predicted_ttft_above_the_slo_rejects_before_prefill_and_says_when_to_come_back() -> None:
    cluster = Cluster(admission=SloAdmission(Slo(ttft_s=1.5)))
    cluster.arrive("a")
    cluster.arrive("b")
    (reject,) = cluster(Arrived(request("c")))
    assert isinstance(reject, Reject)
    assert reject.code == "slo_ttft"
    assert reject.retry_after_s == pytest.approx(0.5)
    assert "predicted TTFT 2 s exceeds the SLO of 1.5 s" in reject.decision.reason
    assert cluster.arrive("d", now=0.51)


def test_time_at_the_gateway_counts_towards_the_ttft() -> None:
    cluster = Cluster(admission=SloAdmission(Slo(ttft_s=1.5)))
    (reject,) = cluster(Arrived(request("a", at=0.0)), 0.6)
    assert isinstance(reject, Reject)


def test_a_scaled_slo_gives_long_prompts_longer() -> None:
    admission = SloAdmission(ScaledSlo(ttft_floor_s=0.1, ttft_factor=1.5))
    assert Cluster(admission=admission).arrive("long", 5000)


def test_a_predicted_tbt_above_the_slo_rejects() -> None:
    cluster = Cluster(instance("p0", Role.PREFILL), instance("d0", Role.DECODE), admission=SloAdmission(Slo(tbt_s=0.0125)))
    for i in range(2):
        cluster.arrive(f"r{i}", 10)
    (reject,) = cluster(Arrived(request("r", 10)))
    assert isinstance(reject, Reject)
    assert reject.code == "slo_tbt"
    assert reject.retry_after_s == pytest.approx(50 * 0.013 / 2)  # one of two leaves every half stay


def test_a_short_wait_for_a_seat_in_the_decode_batch_rejects_nobody() -> None:
    infos = instance("p0", Role.PREFILL), instance("d0", Role.DECODE, batch=1)
    cluster = Cluster(*infos, admission=SloAdmission(Slo(tbt_s=1.0)))
    assert cluster.arrive("a").decode == cluster.arrive("b").decode == "d0"


def test_a_full_decode_pool_rejects_before_prefill() -> None:
    infos = instance("p0", Role.PREFILL), instance("d0", Role.DECODE, batch=1)
    cluster = Cluster(*infos, admission=SloAdmission(Slo(tbt_s=0.02)))
    cluster.arrive("a")
    (reject,) = cluster(Arrived(request("b")))
    assert isinstance(reject, Reject)
    assert reject.code == "decode_full"
    assert Cluster(*infos, admission=ADMISSIONS["off"](Slo())).arrive("a").decode == "d0"


def test_room_is_held_per_node_from_placement_to_end() -> None:
    cluster = Cluster(instance("p0", Role.PREFILL), *(instance(f"d{i}", Role.DECODE, node="shared", kv=2000) for i in (0, 1)))
    cluster.arrive("a", 1000)
    assert "once there is room" in cluster.arrive("b", 1000).decision.reason
    for name in ("a", "b"):
        cluster(Aborted(name))
    assert "once there is room" not in cluster.arrive("c", 1000).decision.reason


def test_a_failed_request_goes_elsewhere_and_is_given_up_after_its_attempts() -> None:
    cluster = Cluster(config=replace_config(max_attempts=3))
    cluster.arrive("r")
    (second,) = cluster(Failed("r", "p0", "out of memory"))
    assert isinstance(second, Prefill)
    assert second.instance == "p1"
    (third,) = cluster(Failed("r", "p1", "out of memory"))
    assert isinstance(third, Prefill)
    (fail,) = cluster(Failed("r", third.instance, "out of memory"))
    assert fail == Fail("r", "attempts_exhausted", f"gave up after 3 attempts; {third.instance}: out of memory")


def replace_config(max_attempts: int) -> ConductorConfig:
    return ConductorConfig(kv_bytes_per_token=1000, block_tokens=100, max_attempts=max_attempts)


def test_requests_of_a_lost_prefill_instance_are_placed_again() -> None:
    cluster = Cluster(policy=LeastLoaded())
    for i in range(3):
        cluster.arrive(f"r{i}")
    commands = cluster(InstanceLost("p0", 1))
    assert [(c.request_id, c.instance) for c in commands if isinstance(c, Prefill)] == [("r0", "p1"), ("r2", "p1")]
    assert len(commands) == 2


def test_requests_of_a_lost_decode_instance_are_prefilled_again() -> None:
    cluster = Cluster()
    cluster.arrive("r")
    cluster(PrefillDone("r", "p0", 0))
    (again,) = cluster(InstanceLost("d0", 1))
    assert isinstance(again, Prefill)
    assert again.decode == "d1"


def test_a_request_whose_decode_instance_died_during_prefill_gets_another_at_hand_off() -> None:
    cluster = Cluster()
    cluster.arrive("r")
    assert cluster(InstanceLost("d0", 1)) == []
    assert cluster(PrefillDone("r", "p0", 0)) == [Decode("r", "d1", "p0")]


def test_a_hand_off_that_nobody_can_take_is_cancelled_and_the_request_waits() -> None:
    cluster = Cluster(instance("p0", Role.PREFILL), instance("d0", Role.DECODE))
    cluster.arrive("r")
    cluster(InstanceLost("d0", 1))
    assert cluster(PrefillDone("r", "p0", 0)) == [Cancel("r", "p0")]
    assert cluster.conductor.num_requests == 1


def test_requests_without_an_instance_wait_for_one_and_are_spread_when_it_comes() -> None:
    cluster = Cluster(instance("p0", Role.PREFILL), instance("d0", Role.DECODE))
    for name in ("a", "b"):
        cluster.arrive(name)
    assert cluster(InstanceLost("p0", 1)) == []
    commands = cluster(InstanceJoined(instance("p1", Role.PREFILL)), 5.0)
    waits = {c.request_id: c.candidate.wait_s for c in commands if isinstance(c, Prefill)}
    assert waits == {"a": 0.0, "b": pytest.approx(1.0)}


def test_requests_wait_for_an_instance_that_changes_its_role_too() -> None:
    cluster = Cluster(instance("p0", Role.PREFILL), instance("d0", Role.DECODE))
    cluster.arrive("r")
    cluster(InstanceLost("p0", 1))
    (again,) = cluster(InstanceJoined(instance("d0", Role.MIXED)))
    assert isinstance(again, Prefill)
    assert again.instance == again.decode == "d0"


def test_a_request_does_not_wait_for_an_instance_for_ever() -> None:
    cluster = Cluster(instance("p0", Role.PREFILL), instance("d0", Role.DECODE))
    for name in ("a", "b"):
        cluster.arrive(name)
    cluster(InstanceLost("p0", 1), 1.0)
    assert cluster(Aborted("b"), 2.0) == []
    assert cluster(Tick(), 60.9) == []
    assert cluster(Tick(), 61.0) == [Fail("a", "no_instance", "no prefill instance came back; p0 was lost")]
    assert cluster.conductor.num_requests == 0


def test_the_loss_of_an_earlier_incarnation_changes_nothing() -> None:
    cluster = Cluster()
    cluster(InstanceJoined(instance("p0", Role.PREFILL, epoch=2)))
    cluster.arrive("r")
    assert cluster(InstanceLost("p0", 1)) == []
    assert cluster(InstanceJoined(instance("p0", Role.PREFILL, epoch=1))) == []
    assert cluster.conductor.counters["stale_events"] == 2


def test_an_instance_that_started_again_has_lost_its_requests_but_can_have_them_anew() -> None:
    cluster = Cluster(instance("m0", Role.MIXED))
    cluster.arrive("r")
    (again,) = cluster(InstanceJoined(instance("m0", Role.MIXED, epoch=2)))
    assert isinstance(again, Prefill)
    assert again.instance == "m0"


def test_an_instance_may_change_its_role_and_keep_its_requests() -> None:
    cluster = Cluster()
    cluster.arrive("r")
    assert cluster(InstanceJoined(replace(instance("p0", Role.PREFILL), role=Role.DECODE))) == []
    assert cluster(PrefillDone("r", "p0", 0)) == [Decode("r", "d0", "p0")]


def test_a_lost_node_is_forgotten_by_the_directory() -> None:
    cluster = Cluster()
    cluster(BlocksStored("node-p1", 1, KEYS[:5]))
    cluster(NodeLost("node-p1"))
    assert cluster.arrive("r", keys=KEYS[:10]).instance == "p0"


def test_a_gap_in_block_events_asks_for_the_inventory_until_it_comes() -> None:
    cluster = Cluster()
    cluster(BlocksStored("node-p1", 1, KEYS[:2]))
    assert cluster(BlocksRemoved("node-p1", 4, KEYS[1:2])) == [Resync("node-p1")]
    assert cluster(Tick()) == [Resync("node-p1")]
    cluster(Inventory("node-p1", 5, KEYS[:7]))
    assert cluster(Tick()) == []
    assert cluster.arrive("r", keys=KEYS[:10]).candidate.prefix_tokens == 700


def test_what_no_correct_body_sends_is_refused() -> None:
    cluster = Cluster()
    cluster.arrive("r")
    with pytest.raises(InvariantError, match="arrived twice"):
        cluster(Arrived(request("r")))
    with pytest.raises(InvariantError, match="StepDone"):
        cluster(StepDone())


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_events_and_seed_give_the_same_commands(name: str) -> None:
    def run() -> list[Command]:
        cluster = Cluster(policy=POLICIES[name]())
        commands = [c for i in range(6) for c in cluster(Arrived(request(f"r{i}", 100 + 50 * i, keys=KEYS[:i])), 0.1 * i)]
        return commands + cluster(InstanceLost("p1", 1), 1.0) + cluster(InstanceLost("d0", 1), 1.1)

    assert run() == run()
