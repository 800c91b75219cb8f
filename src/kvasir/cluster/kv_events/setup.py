"""The publisher that `kvasir serve` was asked for."""

from __future__ import annotations

from kvasir.cluster.config import ServeConfig
from kvasir.cluster.kv_events.format import WireFormat
from kvasir.cluster.kv_events.lineage import Lineage
from kvasir.cluster.kv_events.publisher import KvEventPublisher
from kvasir.cluster.kv_events.stream import EventStream
from kvasir.engine.interface import ModelSpec


def kv_event_publisher(config: ServeConfig, spec: ModelSpec) -> KvEventPublisher | None:
    """None without --kv-events. Raises ConfigError when it cannot listen there."""
    if config.kv_events is None:
        return None
    wire = WireFormat(config.kv_events_shape, config.kv_events_hashes)
    return KvEventPublisher(
        EventStream(Lineage(spec.block_tokens), wire),
        endpoint=config.kv_events,
        replay_endpoint=config.kv_events_replay,
        model=config.served_model_name or spec.name,
        wire=wire,
    )
