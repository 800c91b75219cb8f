"""Of many, those are seen who would have a prompt done first."""

from random import Random

import pytest

from kvasir.core.events import InstanceInfo
from kvasir.core.request import Role
from kvasir.costs.fitted import DecodeFit, FittedCost, PrefillFit
from kvasir.costs.quick import quick
from kvasir.pool.directory import BlockDirectory
from kvasir.pool.match import PrefixMatch
from kvasir.scheduling import contenders, few
from kvasir.scheduling.few import FewView
from kvasir.scheduling.fleet import Fleet
from kvasir.scheduling.instance import Instance, Seat
from kvasir.scheduling.policies.kvasir import Kvasir

COSTS = quick(FittedCost(PrefillFit(0.0, 1e-3, 0, 0), DecodeFit(0.010, 1e-3, 0.0), 0.0, 1e6))
KEYS = tuple(number.to_bytes(16, "big") for number in range(9))
BLOCK_TOKENS = 100


def view_of(fleet: Fleet, directory: BlockDirectory, *, layerwise: bool = True, kv_bytes: int = 1, now: float = 0.0) -> FewView:
    """For a prompt of 1,000 tokens, which takes 1 s to compute, 0.1 s behind nine blocks of prefix."""
    view = FewView(
        fleet,
        tbt_s=0.1,
        costs=COSTS,
        kv_bytes_per_token=kv_bytes,
        block_tokens=BLOCK_TOKENS,
        chunk_tokens=None,
        layerwise=layerwise,
        max_stages=1,
        stages_on_one_node=False,
        policy=Kvasir(),
    )
    view.look(directory.match(KEYS), num_prompt_tokens=1000, now=now, rank=now, due_s=30.0)
    return view


def seen(fleet: Fleet, directory: BlockDirectory, *, layerwise: bool = True, kv_bytes: int = 1) -> list[str]:
    view = view_of(fleet, directory, layerwise=layerwise, kv_bytes=kv_bytes)
    assert not view.is_whole
    assert view.num_prefillers == len(fleet.prefillers)
    return [known.instance.id for known in view.prefillers]


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """p0 to p4 are free in 0.5 to 0.9 s, m at once, but it prefills half of the time."""
    monkeypatch.setattr(few, "FEW", 0)
    fleet = Fleet(COSTS, 0.064)
    for number in range(5):
        fleet.join(InstanceInfo(f"p{number}", Role.PREFILL, f"n{number}", 1, 10_000, 8))
        fleet.sent(f"p{number}", "r", seconds=0.5 + 0.1 * number, tokens=1, now=0.0, rank=0.0, due_s=30.0)
    fleet.join(InstanceInfo("m", Role.MIXED, "nm", 1, 10_000, 64))
    for number in range(21):
        fleet.sit("m", str(number), Seat(1, 1, 0.0, 10.0), 0.0)
        fleet.take_seat("m", str(number), 0.0)
    assert fleet["m"].book.pace == pytest.approx(0.5, abs=0.01)
    return fleet


def holding(*nodes: str) -> BlockDirectory:
    directory = BlockDirectory()
    for node in nodes:
        directory.stored(node, 1, KEYS)
    return directory


def test_without_a_prefix_those_who_will_have_computed_it_first(fleet: Fleet) -> None:
    assert seen(fleet, holding()) == ["p0", "p1", "p2"]


def test_with_a_prefix_those_who_will_have_fetched_it_first(fleet: Fleet) -> None:
    assert seen(fleet, holding("n4")) == ["m", "p0", "p1"]


def test_a_wait_hides_the_transfer(fleet: Fleet) -> None:
    """The transfer takes 0.9 s: p0 to p3 would be done at the same time, m later, and whoever has it as soon as m."""
    among = seen(fleet, holding("n4"), kv_bytes=1000)
    assert len(among) == 3
    assert set(among) < {"p0", "p1", "p2", "p3"}
    assert seen(fleet, holding("n4"), layerwise=False, kv_bytes=1000) == ["m", "p0", "p4"]


@pytest.mark.parametrize("seed", range(60))
def test_nobody_else_would_be_done_sooner(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = Random(seed)
    fleet, directory = Fleet(COSTS, 0.064), BlockDirectory()
    waits_s = rng.choice(([0.0], [0.0, 0.2, 1.0], [1.0, 2.0, 3.0, 4.0]))
    for number in range(rng.choice((20, 90))):
        name = f"i{number:03}"
        fleet.join(InstanceInfo(name, rng.choice((Role.PREFILL, Role.MIXED)), name, 1, 10_000, 64))
        if (wait_s := rng.choice(waits_s)) > 0.0:
            fleet.sent(name, "r", seconds=wait_s, tokens=1, now=0.0, rank=0.0, due_s=30.0)
        if rng.random() < 0.3:
            directory.stored(name, 1, KEYS[: rng.choice((1, 5, 9))])
    for now in (0.0, 0.7, 2.0):  # some are overdue then
        for known in rng.sample(fleet.prefillers, 5):
            if known.can_decode:
                fleet.sit(known.id, f"{known.id} {now}", Seat(1, 1, 0.0, 10.0), now)
                fleet.take_seat(known.id, f"{known.id} {now}", now)
            fleet.done(known.id, "r", now)
        for kv_bytes in (1, 1000):
            monkeypatch.setattr(few, "FEW", 1000)
            all_s = sorted(known.ttft_s for known in view_of(fleet, directory, kv_bytes=kv_bytes, now=now).prefillers)
            monkeypatch.setattr(few, "FEW", 0)
            view = view_of(fleet, directory, kv_bytes=kv_bytes, now=now)
            assert sorted(known.ttft_s for known in view.prefillers) == pytest.approx(all_s[:3])
            decoding_s = sorted(known.ttft_s for known in view.decoding())
            monkeypatch.setattr(few, "FEW", 1000)
            view = view_of(fleet, directory, kv_bytes=kv_bytes, now=now)
            assert decoding_s == pytest.approx(sorted(k.ttft_s for k in view.prefillers if k.instance.can_decode)[:3])
    fleet.check()


@pytest.mark.parametrize("seed", range(20))
def test_a_mask_of_nodes_becomes_the_bits_of_the_instances_on_them(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "MOST_KNOWN", 8)
    rng = Random(seed)
    nodes = [f"n{number}" for number in range(rng.choice((1, 40, 200)))]
    instances = [Instance(InstanceInfo(f"i{n:03}", Role.PREFILL, rng.choice([*nodes, "unheard"]), 1, 1, 1)) for n in range(150)]
    rng.shuffle(instances)
    groups = [contenders.Group(n, list(range(s, s + 16)), instances[s : s + 16]) for n, s in enumerate(range(0, 150, 16))]
    holders, everybodys = contenders.HoldersByGroup(groups), 0
    for _ in range(3):
        rng.shuffle(nodes)
        heard = tuple(nodes)
        holders.see(PrefixMatch((), (), heard))
        for _ in range(60):
            everybodys |= 1 << rng.randrange(len(nodes))
            mask = rng.choice((everybodys, everybodys, 1 << rng.randrange(len(nodes)), rng.getrandbits(len(nodes)), 0))
            on = {node for bit, node in enumerate(heard) if mask >> bit & 1}
            expected = [sum(1 << place for place, known in enumerate(g.members) if known.node in on) for g in groups]
            assert holders.of(mask) == expected
