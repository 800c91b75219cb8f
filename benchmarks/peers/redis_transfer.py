"""Redis over TCP loopback from a raw socket, the fastest client: `python -m benchmarks.peers.redis_transfer [MIB]`."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.peers import timing
from benchmarks.peers.mooncake_store import wait_for_port

PORT = 16479


def main() -> None:
    with server():
        timing.report_socket(PORT, put, get, clear)


def clear(sock: socket.socket) -> None:
    sock.sendall(b"FLUSHALL\r\n")
    expect(sock, b"+OK\r\n")


def put(sock: socket.socket, memory: memoryview, offsets: list[int], size: int) -> None:
    for at in offsets:
        sock.sendall(b"*3\r\n$3\r\nSET\r\n$16\r\n%016d\r\n$%d\r\n" % (at, size))
        sock.sendall(memory[at : at + size])
        sock.sendall(b"\r\n")
    for _ in offsets:
        expect(sock, b"+OK\r\n")


def get(sock: socket.socket, memory: memoryview, offsets: list[int], size: int) -> None:
    sock.sendall(b"".join(b"*2\r\n$3\r\nGET\r\n$16\r\n%016d\r\n" % at for at in offsets))
    for at in offsets:
        expect(sock, b"$%d\r\n" % size)
        receive(sock, memory[at : at + size])
        expect(sock, b"\r\n")


def expect(sock: socket.socket, answer: bytes) -> None:
    got = bytearray(len(answer))
    receive(sock, memoryview(got))
    if got != answer:
        raise RuntimeError(f"Redis answered {bytes(got)!r}")


def receive(sock: socket.socket, into: memoryview) -> None:
    while into.nbytes:
        got = sock.recv_into(into, into.nbytes, socket.MSG_WAITALL)
        if not got:
            raise EOFError("Redis hung up")
        into = into[got:]


@contextmanager
def server() -> Iterator[None]:
    command = ["redis-server", "--port", str(PORT), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for_port(PORT)
            yield
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
