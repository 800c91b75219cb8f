"""LMCache's own server over TCP loopback from a raw socket: `python -m benchmarks.peers.lmcache_server [MIB]`.

A put is not acknowledged, so each turn of puts ends with the question whether the last one is there.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.peers import timing
from benchmarks.peers.mooncake_store import wait_for_port
from benchmarks.peers.redis_transfer import receive

PORT = 16481
PUT, GET, EXIST, SUCCESS = 1, 2, 3, 200
BINARY, UINT8 = 4, 6
REQUEST, ANSWER = struct.Struct("9i150s"), struct.Struct("9i")


def main() -> None:
    with server():
        timing.report_socket(PORT, put, get)


def put(sock: socket.socket, memory: memoryview, offsets: list[int], size: int) -> None:
    for at in offsets:
        sock.sendall(request(PUT, at, size))
        sock.sendall(memory[at : at + size])
    sock.sendall(request(EXIST, offsets[-1], size))
    expect(sock)


def get(sock: socket.socket, memory: memoryview, offsets: list[int], size: int) -> None:
    sock.sendall(b"".join(request(GET, at, size) for at in offsets))
    for at in offsets:
        expect(sock, size)
        receive(sock, memory[at : at + size])


def request(command: int, offset: int, size: int) -> bytes:
    """A block's key is its offset and size; its shape is that of bytes."""
    key = f"model@1@0@{size + offset:x}@uint8".encode()
    return REQUEST.pack(command, size, BINARY, UINT8, 0, size, 0, 0, 0, key.ljust(150))


def expect(sock: socket.socket, length: int | None = None) -> None:
    raw = bytearray(ANSWER.size)
    receive(sock, memoryview(raw))
    code, found = ANSWER.unpack(raw)[:2]
    if code != SUCCESS or (length is not None and found != length):
        raise RuntimeError(f"LMCache answered {code}, {found} bytes")


@contextmanager
def server() -> Iterator[None]:
    command = [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(PORT)]
    environment = os.environ | {"LMCACHE_LOG_LEVEL": "ERROR", "LMCACHE_TRACK_USAGE": "false"}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment) as process:
        try:
            wait_for_port(PORT)
            time.sleep(0.2)  # the probe's connection ends
            yield
        finally:
            process.kill()


if __name__ == "__main__":
    main()
