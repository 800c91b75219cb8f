"""Decode instances are told when prefills on their node begin and end to need the cores, and only then."""

from __future__ import annotations

from kvasir.core.commands import ShareCores
from kvasir.core.events import InstanceInfo
from kvasir.core.request import Role
from kvasir.scheduling.cores import CoreSharing
from kvasir.scheduling.instance import Instance


def instance(name: str, role: Role, node: str = "a", epoch: int = 1) -> Instance:
    return Instance(InstanceInfo(name, role, node, epoch, kv_tokens=1000, max_batch=8))


def test_a_decode_instance_hears_once_that_prefills_came_and_once_that_they_went() -> None:
    prefill, decode, cores = instance("p", Role.PREFILL), instance("d", Role.DECODE), CoreSharing()
    assert cores.commands([prefill, decode]) == []
    prefill.book.sent("r", seconds=1.0, tokens=100, now=0.0)
    assert cores.commands([prefill, decode]) == [ShareCores("d", with_prefill=True)]
    prefill.book.sent("s", seconds=1.0, tokens=100, now=0.0)
    assert cores.commands([prefill, decode]) == []
    prefill.book.left("r", 1.0)
    prefill.book.left("s", 2.0)
    assert cores.commands([prefill, decode]) == [ShareCores("d", with_prefill=False)]


def test_other_nodes_and_mixed_instances_are_left_alone() -> None:
    prefill, cores = instance("p", Role.PREFILL), CoreSharing()
    prefill.book.sent("r", seconds=1.0, tokens=100, now=0.0)
    assert cores.commands([prefill, instance("d", Role.DECODE, node="b"), instance("m", Role.MIXED)]) == []


def test_a_decode_instance_that_came_back_is_told_again() -> None:
    prefill, cores = instance("p", Role.PREFILL), CoreSharing()
    prefill.book.sent("r", seconds=1.0, tokens=100, now=0.0)
    assert cores.commands([prefill, instance("d", Role.DECODE)]) == [ShareCores("d", with_prefill=True)]
    assert cores.commands([prefill, instance("d", Role.DECODE, epoch=2)]) == [ShareCores("d", with_prefill=True)]
