"""The stream of block events in vLLM's wire format, out of this cluster and into a directory."""

from kvasir.cluster.kv_events.follower import Follower, FollowerCounts
from kvasir.cluster.kv_events.format import AllBlocksCleared, Batch, BlockRemoved, BlockStored, WireFormat
from kvasir.cluster.kv_events.lineage import Lineage
from kvasir.cluster.kv_events.publisher import KvEventPublisher
from kvasir.cluster.kv_events.setup import kv_event_publisher
from kvasir.cluster.kv_events.stream import EventStream
from kvasir.cluster.kv_events.subscriber import KvEventSubscriber

__all__ = [
    "AllBlocksCleared",
    "Batch",
    "BlockRemoved",
    "BlockStored",
    "EventStream",
    "Follower",
    "FollowerCounts",
    "KvEventPublisher",
    "KvEventSubscriber",
    "Lineage",
    "WireFormat",
    "kv_event_publisher",
]
