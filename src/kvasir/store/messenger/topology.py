"""Where the nodes stand and how fast the links between them are, as declared: who is asked first for a block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum


class Distance(IntEnum):
    """How far a node is; nearer is less."""

    HOST = 0
    RACK = 1
    CLUSTER = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node stands: names that are equal for nodes of one machine, or of one rack.

    `link_bytes_s` is what its network carries; 0 when nobody declared it.
    """

    host: str
    rack: str
    link_bytes_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Topology:
    """Places of nodes, and bytes a second where none are declared. A node without a place is as far as can be."""

    places: Mapping[str, Place] = field(default_factory=dict)
    rack_bytes_s: float = 3e9
    cluster_bytes_s: float = 1.25e9

    def distance(self, here: str, there: str) -> Distance:
        one, other = self.places.get(here), self.places.get(there)
        if one is None or other is None:
            return Distance.CLUSTER
        if one.host == other.host:
            return Distance.HOST
        return Distance.RACK if one.rack == other.rack else Distance.CLUSTER

    def bytes_s(self, here: str, there: str) -> float:
        """What the way between two nodes carries: as much as the slower of their links. Within a host nothing is in the way."""
        distance = self.distance(here, there)
        if distance is Distance.HOST:
            return math.inf
        undeclared = self.rack_bytes_s if distance is Distance.RACK else self.cluster_bytes_s
        places = [self.places.get(node) for node in (here, there)]
        return min([(place.link_bytes_s if place is not None else 0.0) or undeclared for place in places])

    def nearest_first(self, here: str, nodes: Iterable[str]) -> list[str]:
        """By the speed of the way, then by distance, else in the order given."""
        return sorted(nodes, key=lambda node: (-self.bytes_s(here, node), self.distance(here, node)))
