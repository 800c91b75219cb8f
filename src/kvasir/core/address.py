"""Network addresses as text."""

from __future__ import annotations


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of HOST:PORT, an IPv6 host without its brackets; None when it is none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        return None
    return host.strip("[]"), int(port)
