"""The Conductor against a naive cluster: one outcome each, nothing sent to the dead, the directory is what nodes said."""

from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvasir.core.commands import Cancel, Decode, Fail, Prefill, Reject, Resync
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
    NodeLost,
    PrefillDone,
    Tick,
)
from kvasir.core.request import FinishReason, Request, Role, Slo
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.scheduling.admission import ADMISSIONS
from kvasir.scheduling.conductor import Conductor
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.placer import Rules
from kvasir.scheduling.policies import POLICIES

KEYS = tuple(bytes([i]) * 16 for i in range(6))
INSTANCES = {f"{role[0]}{i}": Role(role) for role in ("prefill", "decode", "mixed") for i in (0, 1)}
NODES = ("n0", "n1")
COSTS = FittedCost(PrefillFit(0.01, 1e-3, 0, 0), DecodeFit(0.010, 1e-3, 1e-6), 0.0, 1e8)

names = st.sampled_from(sorted(INSTANCES))
nodes = st.sampled_from(NODES)
keys = st.lists(st.sampled_from(KEYS), max_size=4, unique=True)


class ConductorMachine(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(sorted(POLICIES)), admission=st.sampled_from(sorted(ADMISSIONS)))
    def start(self, policy: str, admission: str) -> None:
        config = ConductorConfig(
            kv_bytes_per_token=1000, block_tokens=10, max_queued=6, max_attempts=3, expected_output_tokens=20
        )
        slo = Slo(ttft_s=0.5, tbt_s=0.02)
        self.conductor = Conductor(
            config, COSTS, rules=Rules(POLICIES[policy](), ADMISSIONS[admission](slo)), slo=slo, rng=Random(1)
        )
        self.now = 0.0
        self.up: dict[str, int] = {}
        self.epochs: dict[str, int] = dict.fromkeys(INSTANCES, 0)
        self.held: dict[str, str] = {}  # request → instance that works on it
        self.is_decoding: set[str] = set()
        self.homeless: set[str] = set()
        self.outcomes: dict[str, str] = {}
        self.arrived: list[str] = []
        self.blocks: dict[str, set[bytes]] = {node: set() for node in NODES}
        self.seqs: dict[str, int] = dict.fromkeys(NODES, 0)
        for name in ("p0", "d0"):
            self.join(name)

    # --- what may happen ---

    @rule(name=names)
    def join(self, name: str) -> None:
        self.epochs[name] += 1
        node = NODES[int(name[1])]
        held = [r for r, i in self.held.items() if i == name]
        self.up[name] = self.epochs[name]
        self.handle(InstanceJoined(InstanceInfo(name, INSTANCES[name], node, self.epochs[name], 300, 4)), moved=held)

    @rule(name=names, late=st.booleans())
    def lose(self, name: str, late: bool) -> None:
        if late or name not in self.up:
            self.handle(InstanceLost(name, self.epochs[name] - 1))
            return
        held = [r for r, i in self.held.items() if i == name]
        epoch = self.up.pop(name)
        self.handle(InstanceLost(name, epoch), moved=held)

    @rule(tokens=st.integers(1, 120), output=st.integers(1, 200), prefix=st.integers(0, 6))
    def arrive(self, tokens: int, output: int, prefix: int) -> None:
        name = f"r{len(self.arrived)}"
        self.arrived.append(name)
        self.handle(Arrived(Request(name, tokens, output, KEYS[: min(prefix, tokens // 10)], self.now)), moved=[name])

    @precondition(lambda self: self.arrived)
    @rule(data=st.data(), what=st.sampled_from(["done", "finish", "fail", "abort"]), name=names, honest=st.booleans())
    def progress(self, data: st.DataObject, what: str, name: str, honest: bool) -> None:
        """By the instance that has the request, or by one that has it no longer."""
        request = data.draw(st.sampled_from(sorted(self.held) if honest and self.held else self.arrived))
        who = self.held.get(request, name) if honest else name
        is_mine = self.held.get(request) == who
        match what:
            case "done":
                self.handle(PrefillDone(request, who, 0))
            case "finish":
                if is_mine:
                    self._outcome(request, "finished")
                self.handle(Finished(request, who, FinishReason.STOP, 1))
            case "fail":
                self.handle(Failed(request, who, "broken"), moved=[request] if is_mine else [])
            case _:
                if request in self.held or request in self.homeless:
                    self._outcome(request, "aborted")
                self.handle(Aborted(request))

    @rule(seconds=st.floats(0, 100))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.handle(Tick())

    @rule(name=names, tokens=st.integers(0, 300))
    def heartbeat(self, name: str, tokens: int) -> None:
        self.handle(Heartbeat(name, self.epochs[name], InstanceLoad(waiting_tokens=tokens)))

    @rule(node=nodes, keys=keys)
    def store(self, node: str, keys: list[bytes]) -> None:
        self.seqs[node] += 1
        self.blocks[node].update(keys)
        self.handle(BlocksStored(node, self.seqs[node], tuple(keys)))

    @rule(node=nodes, keys=keys)
    def remove(self, node: str, keys: list[bytes]) -> None:
        self.seqs[node] += 1
        self.blocks[node].difference_update(keys)
        self.handle(BlocksRemoved(node, self.seqs[node], tuple(keys)))

    @rule(node=nodes)
    def lose_node(self, node: str) -> None:
        self.seqs[node] = 0
        self.blocks[node].clear()
        self.handle(NodeLost(node))

    # --- what must hold ---

    @invariant()
    def holds(self) -> None:
        self.conductor.check()
        assert sorted([*self.held, *self.homeless, *self.outcomes]) == sorted(self.arrived)
        assert self.conductor.num_requests == len(self.held) + len(self.homeless)
        assert not (self.homeless and self.conductor.ready)
        assert set(self.held.values()) <= set(self.up)
        for key in KEYS:
            assert set(self.conductor.directory.holders(key)) == {node for node, held in self.blocks.items() if key in held}
        roles = [INSTANCES[name] for name in self.up]
        assert self.conductor.ready == (any(r.can_prefill for r in roles) and any(r.can_decode for r in roles))

    def handle(self, event: Event, moved: list[str] | None = None) -> None:
        """`moved` are the requests that this event must place, bring to their end, or let wait for an instance."""
        open_ = dict.fromkeys(moved or [])
        for command in self.conductor.handle(event, self.now):
            match command:
                case Prefill():
                    assert command.instance in self.up
                    assert command.decode in self.up
                    assert INSTANCES[command.instance].can_prefill
                    assert INSTANCES[command.decode].can_decode
                    assert command.decision.reason
                    assert command.request_id in open_ or command.request_id in self.homeless
                    self.held[command.request_id] = command.instance
                    self.homeless.discard(command.request_id)
                    self.is_decoding.discard(command.request_id)
                    open_.pop(command.request_id, None)
                case Decode():
                    assert command.instance in self.up
                    assert command.request_id not in self.is_decoding
                    self.is_decoding.add(command.request_id)
                    self.held[command.request_id] = command.instance
                case Cancel():
                    assert command.instance in self.up
                    if isinstance(event, PrefillDone):
                        open_[command.request_id] = None  # nobody can take the hand-off
                case Reject():
                    assert command.retry_after_s >= 0
                    assert isinstance(event, Arrived), "an admitted request is never rejected"
                    self._outcome(command.request_id, "rejected")
                    del open_[command.request_id]
                case Fail():
                    self._outcome(command.request_id, "failed")
                    open_.pop(command.request_id, None)
                case Resync():
                    raise AssertionError("there was no gap")
                case _:
                    raise AssertionError(command)
        for request in open_:
            assert not self.conductor.ready, "neither placed nor ended, and not for lack of instances"
            del self.held[request]
            self.is_decoding.discard(request)
            self.homeless.add(request)

    def _outcome(self, request: str, outcome: str) -> None:
        assert request not in self.outcomes, "two outcomes"
        self.outcomes[request] = outcome
        self.held.pop(request, None)
        self.homeless.discard(request)
        self.is_decoding.discard(request)


TestConductorMachine = ConductorMachine.TestCase
TestConductorMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None, derandomize=True)
