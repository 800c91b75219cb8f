"""Who belongs to the cluster besides the head: nodes join, renew a lease, drain and leave, or fall silent and are lost."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from msgspec.structs import replace

from kvasir.cluster.hub import Clock, Hub
from kvasir.cluster.messages import (
    EndInstance,
    FromJoiner,
    Goodbye,
    HelloNode,
    HubAlive,
    InstanceGone,
    LeaveNode,
    NodeAlive,
    NotWelcome,
    ToJoiner,
    Welcome,
)
from kvasir.engine.interface import ModelSpec

LEASE_S = 3.0
"""A node that has not renewed its lease for so long is lost, and its requests are placed again."""

DRAIN_S = 60.0
"""How long a leaving node may take to finish what it has; the rest is placed again, and no token is lost."""

LOOK_S = 0.25

SendTo = Callable[[str, ToJoiner], bool]


@dataclass(slots=True)
class _Member:
    peer: str
    epoch: int
    renewed_s: float
    drained_by_s: float = math.inf  # finite once it leaves


class Members:
    """Nodes get names that were never used before, so that nothing late can be taken for another's."""

    def __init__(self, hub: Hub, send: SendTo, clock: Clock):
        self._hub = hub
        self._send = send
        self._clock = clock
        self._members: dict[str, _Member] = {}
        self._num_joined = 0
        self._log = structlog.get_logger().bind(part="membership")

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self._members)

    def take(self, peer: str, message: FromJoiner) -> None:
        match message:
            case HelloNode():
                self._hello(peer, message)
            case NodeAlive(node=node, epoch=epoch):
                self._renew(peer, node, epoch)
            case InstanceGone(node=node, instance=instance):
                if node in self._members:
                    self._hub.lose_instance(instance)
            case LeaveNode(node=node):
                self._drain(node)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            now = self._clock()
            for node, member in list(self._members.items()):
                if now - member.renewed_s > LEASE_S:
                    self._log.warning("node lost: it did not renew its lease", node=node, silent_s=now - member.renewed_s)
                    self._remove(node)
                elif member.drained_by_s < math.inf and (now >= member.drained_by_s or self._hub.is_idle(node)):
                    self._log.info("node left", node=node, drained=self._hub.is_idle(node))
                    self._send(member.peer, Goodbye())
                    self._remove(node)

    def dismiss(self) -> None:
        """The cluster ends."""
        for member in self._members.values():
            self._send(member.peer, Goodbye())

    def end_instance(self, name: str) -> None:
        """A silent instance of a joined node: its own node must end its process before its slots are given to others."""
        member = self._members.get(self._hub.node_of(name))
        if member is not None:
            self._send(member.peer, EndInstance(name))

    def _hello(self, peer: str, hello: HelloNode) -> None:
        if (reason := _mismatch(self._hub.spec, hello.model)) is not None:
            self._log.warning("node refused", peer=peer, reason=reason)
            self._send(peer, NotWelcome(reason))
            return
        for node, member in list(self._members.items()):
            if member.peer == peer:  # it asks again: it has not heard the answer
                self._remove(node)
        self._num_joined += 1
        node = f"node{self._num_joined}"
        self._members[node] = _Member(peer, self._num_joined, self._clock())
        self._log.info("node joined", node=node, instances=hello.num_instances)
        self._send(peer, Welcome(node, self._num_joined, self._hub.spec.max_model_len, LEASE_S))

    def _renew(self, peer: str, node: str, epoch: int) -> None:
        member = self._members.get(node)
        is_known = member is not None and member.epoch == epoch
        if member is not None and is_known:
            member.renewed_s = self._clock()
        self._send(peer, HubAlive(is_known))

    def _drain(self, node: str) -> None:
        member = self._members.get(node)
        if member is not None and member.drained_by_s == math.inf:
            self._log.info("node drains", node=node)
            member.drained_by_s = self._clock() + DRAIN_S
            self._hub.drain(node)

    def _remove(self, node: str) -> None:
        del self._members[node]
        self._hub.lose_node(node)


def _mismatch(ours: ModelSpec, theirs: ModelSpec) -> str | None:
    """Why KV of the two could not be shared, if so."""
    for name in ("identity", "dtype", "layout", "block_tokens", "slot_bytes"):
        if getattr(ours, name) != getattr(theirs, name):
            return f"its model's {name} is {getattr(theirs, name)!r}, the cluster's is {getattr(ours, name)!r} ({ours.name})"
    if theirs.max_model_len < ours.max_model_len:
        return (
            f"its pool holds requests of {theirs.max_model_len} tokens, the cluster's have up to {ours.max_model_len}:"
            f" give it more --dram, or the head --max-model-len {theirs.max_model_len}"
        )
    return None


def with_length(spec: ModelSpec, welcome: Welcome) -> ModelSpec:
    """The joined node's model, with the cluster's limit."""
    return replace(spec, max_model_len=welcome.max_model_len)
