"""The messenger: moves KV blocks between the arenas of nodes."""

from kvasir.store.messenger.messenger import Fetch, Fetched, Messenger, MessengerLimits, Source
from kvasir.store.messenger.shm import ShmTransport
from kvasir.store.messenger.spans import SpanPair
from kvasir.store.messenger.statistics import TransportStats
from kvasir.store.messenger.tcp import TcpLimits, TcpTransport
from kvasir.store.messenger.tcp_server import TcpServer
from kvasir.store.messenger.topology import Place, Topology
from kvasir.store.messenger.transport import PeerArena, Priority, Transport, host_identity

__all__ = [
    "Fetch",
    "Fetched",
    "Messenger",
    "MessengerLimits",
    "PeerArena",
    "Place",
    "Priority",
    "ShmTransport",
    "Source",
    "SpanPair",
    "TcpLimits",
    "TcpServer",
    "TcpTransport",
    "Topology",
    "Transport",
    "TransportStats",
    "host_identity",
]
