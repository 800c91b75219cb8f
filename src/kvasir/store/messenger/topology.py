"""Where the nodes stand and how fast the links between them are, as declared: who is asked first for a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum


class Distance(IntEnum):
    """How far a node is; nearer is less."""

    HOST = 0
    RACK = 1
    CLUSTER = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node stands: names that are equal for nodes of one machine, or of one rack."""

    host: str
    rack: str


@dataclass(frozen=True, slots=True)
class Topology:
    """Places of nodes, and bytes a second by distance. A node without a place is as far as can be."""

    places: Mapping[str, Place] = field(default_factory=dict)
    host_bytes_s: float = 8e9
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
        """What the link between two nodes carries, as declared."""
        return (self.host_bytes_s, self.rack_bytes_s, self.cluster_bytes_s)[self.distance(here, there)]
