"""What a simulation writes down beside its rows: time in roles, samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from kvasir.core.request import Role
from kvasir.scheduling.conductor import Conductor
from kvasir.simulator.hot import HotBlocks
from kvasir.simulator.instance import SimInstance
from kvasir.simulator.node import SimNode
from kvasir.simulator.samples import Sample


class RoleClock:
    """How long instances were in each role, and busy in it."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[Role, float, float]] = {}
        self._in_s: defaultdict[str, float] = defaultdict(float)
        self._busy_s: defaultdict[str, float] = defaultdict(float)

    def enter(self, instance: SimInstance, now: float) -> None:
        """The instance has started, or has this role from now on."""
        self.leave(instance, now)
        self._since[instance.info.id] = (instance.info.role, now, instance.busy_s)

    def leave(self, instance: SimInstance, now: float) -> None:
        known = self._since.pop(instance.info.id, None)
        if known is not None:
            role, since_s, busy_s = known
            self._in_s[role.value] += now - since_s
            self._busy_s[role.value] += instance.busy_s - busy_s

    def utilisation(self) -> dict[str, float]:
        return {role: self._busy_s[role] / seconds for role, seconds in sorted(self._in_s.items()) if seconds > 0}


class Sampler:
    """Takes samples of a cluster whose instances and nodes are given by id, in order."""

    def __init__(
        self,
        conductor: Conductor,
        instances: Mapping[str, SimInstance],
        nodes: Mapping[str, SimNode],
        hot: HotBlocks,
        instance_ids: tuple[str, ...],
    ):
        self.samples: list[Sample] = []
        self._conductor = conductor
        self._instances = instances
        self._nodes = nodes
        self._hot = hot
        self._ids = instance_ids

    def take(self, now: float, *, arrived: int, rejected: int) -> None:
        """An instance that is down has no wait and no batch, and the role in which it died."""
        waits = {known.info.id: known.book.wait_s(now) for known in self._conductor.instances}
        bodies = [self._instances[name] for name in self._ids]
        holders = self._conductor.directory.holders
        self.samples.append(
            Sample(
                at_s=now,
                arrived=arrived,
                rejected=rejected,
                wait_s=tuple([float(waits.get(name, 0.0)) for name in self._ids]),
                decode_batch=tuple([body.decode_batch for body in bodies]),
                roles=tuple([body.info.role for body in bodies]),
                pool_blocks=tuple([node.num_blocks for node in self._nodes.values()]),
                hot_replicas=tuple([len(holders(key)) for key in self._hot.top()]),
            )
        )
