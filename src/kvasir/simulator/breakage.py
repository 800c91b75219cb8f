"""Carrying faults out: what dies with an instance or a node, and how it comes back."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from kvasir.core.events import InstanceInfo, InstanceLost, NodeLost
from kvasir.simulator.agenda import Agenda
from kvasir.simulator.faults import Fault, FaultKind
from kvasir.simulator.hub import SimHub
from kvasir.simulator.network import Network
from kvasir.simulator.node import SimNode


class Breakage:
    """Plans faults, and what ends them. A fault of what is down already has no effect of its own.

    `start` makes a new incarnation of an instance; `gone` hears which is over.
    """

    def __init__(
        self,
        hub: SimHub,
        network: Network,
        agenda: Agenda,
        *,
        start: Callable[[InstanceInfo], None],
        gone: Callable[[str], None],
    ):
        self._hub = hub
        self._network = network
        self._agenda = agenda
        self._start = start
        self._gone = gone
        self._down: dict[str, InstanceInfo] = {}

    def strike(self, fault: Fault) -> None:
        until_s = self._agenda.now + fault.duration_s
        match fault.kind:
            case FaultKind.INSTANCE:
                if self._kill(fault.target):
                    self._agenda.at(until_s, self._restart, fault.target)
            case FaultKind.NODE:
                node = self._hub.nodes[fault.target]
                if node.is_up:
                    self._kill_node(node)
                    self._agenda.at(until_s, self._restart_node, node)
            case FaultKind.SLOW_NIC:
                node = self._hub.nodes[fault.target]
                self._set_speed((node, fault.factor))
                self._agenda.at(until_s, self._set_speed, (node, 1.0))

    def _kill(self, name: str) -> bool:
        instance = self._hub.instances[name]
        if name in self._down:
            return False
        self._gone(name)
        self._down[name] = instance.info
        instance.die()
        self._hub.tell(InstanceLost(name, instance.info.epoch))
        return True

    def _restart(self, name: str) -> None:
        """Nothing, while its node is down: it comes back with that."""
        info = self._down[name]
        if self._hub.nodes[info.node].is_up:
            del self._down[name]
            self._start(replace(info, epoch=info.epoch + 1))

    def _kill_node(self, node: SimNode) -> None:
        node.stop()
        for name, instance in list(self._hub.instances.items()):
            if instance.node is node:
                self._kill(name)
        for flow in [*node.outgoing.flows, *node.incoming.flows, *node.ssd_in.flows, *node.ssd_out.flows]:
            fail = flow.fail
            self._network.stop(flow)
            if fail is not None:
                fail()
        self._hub.tell(NodeLost(node.spec.id))

    def _restart_node(self, node: SimNode) -> None:
        node.start()
        for name in [name for name, info in self._down.items() if info.node == node.spec.id]:
            self._restart(name)

    def _set_speed(self, change: tuple[SimNode, float]) -> None:
        node, factor = change
        for pipe in (node.outgoing, node.incoming):
            self._network.set_bandwidth(pipe, node.spec.network_bandwidth * factor)
