"""The messenger: moves KV blocks between the arenas of nodes."""

from kvasir.store.messenger.shm import ShmTransport
from kvasir.store.messenger.spans import SpanPair
from kvasir.store.messenger.tcp import TcpLimits, TcpTransport
from kvasir.store.messenger.tcp_server import TcpServer
from kvasir.store.messenger.transport import PeerArena, Priority, Transport, host_identity

__all__ = [
    "PeerArena",
    "Priority",
    "ShmTransport",
    "SpanPair",
    "TcpLimits",
    "TcpServer",
    "TcpTransport",
    "Transport",
    "host_identity",
]
