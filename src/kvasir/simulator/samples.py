"""The state of a simulated cluster now and then, for plots."""

from __future__ import annotations

from msgspec import Struct

from kvasir.core.request import Role


class Sample(Struct, frozen=True):
    """At `at_s`. Instances and nodes are in order of their ids, as in `Run.instances` and `Run.nodes`.

    `wait_s`: predicted seconds of prefill queued; NaN-free, 0 for an instance that is down. `hot_replicas`: on how many nodes
    each of the most hit blocks is, the most hit first.
    """

    at_s: float
    arrived: int
    rejected: int
    wait_s: tuple[float, ...]
    decode_batch: tuple[int, ...]
    roles: tuple[Role, ...]
    pool_blocks: tuple[int, ...]
    hot_replicas: tuple[int, ...]
