"""Two nodes that reach each other by one transport only: blocks really go that way, and tokens equal plain `transformers`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvasir.cluster.config import ServeConfig
from tests.e2e.real import RealCluster, idle, real_cluster
from tests.e2e.test_parity import checkpoint, reference
from tests.e2e.test_two_nodes import address, ask_all, joined, settings, traffic, wait_until

__all__ = ["checkpoint", "reference"]

pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True)
class Network:
    """The addresses of head and joined node, and what runs a command at the latter."""

    head: str = "127.0.0.1"
    joined: str = "127.0.0.1"
    within: tuple[str, ...] = ()


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=10.0, check=False)


@contextmanager
def two_networks() -> Iterator[Network]:
    """This network namespace and another one, with a cable between them; skips where that is not allowed."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command `ip`")
    name, here = f"kvasir{os.getpid()}", f"kv{os.getpid()}"
    made = ip("netns", "add", name)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    subnet = f"10.213.{os.getpid() % 250}"
    try:
        for words in (
            ["link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", name],
            ["address", "add", f"{subnet}.1/24", "dev", here],
            ["link", "set", here, "up"],
            ["-n", name, "address", "add", f"{subnet}.2/24", "dev", "eth0"],
            ["-n", name, "link", "set", "eth0", "up"],
            ["-n", name, "link", "set", "lo", "up"],
        ):
            done = ip(*words)
            if done.returncode:
                pytest.skip(f"no virtual cable here: ip {' '.join(words)}: {done.stderr.strip()}")
        yield Network(f"{subnet}.1", f"{subnet}.2", ("ip", "netns", "exec", name))
    finally:
        ip("link", "delete", here)
        ip("netns", "delete", name)


@contextmanager
def one_network() -> Iterator[Network]:
    yield Network()


def moved(head: RealCluster) -> dict[str, int]:
    """Bytes that all nodes have read, by transport."""
    read: dict[str, int] = {}
    for transports in head.hub.status().transports.values():
        for transport in transports:
            read[transport.name] = read.get(transport.name, 0) + transport.bytes
    return read


@pytest.mark.parametrize(
    ("transport", "networks"),
    [
        pytest.param("shm", one_network, id="shared memory"),
        pytest.param("tcp", two_networks, id="TCP between network namespaces"),
        pytest.param(
            "nixl",
            one_network,
            id="NIXL",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("nixl") is None, reason="NIXL is not installed: pip install nixl nixl-cu12 --no-deps"
            ),
        ),
    ],
)
def test_every_answer_is_right_over_this_transport_alone(
    transport: str, networks: Any, reference: Any, checkpoint: Path
) -> None:
    with networks() as net:
        config = ServeConfig(
            **settings(checkpoint, prefill=1, decode=1, listen_nodes=f"{net.head}:0", advertise=net.head, transports=transport)
        )
        with real_cluster(config) as head:
            flags = {"prefill": 1, "decode": 1, "advertise": net.joined, "transports": transport}
            with joined(address(head), checkpoint, within=net.within, **flags):
                wait_until(head, 4)
                turn = 0
                while turn < 3 or not moved(head).get(transport):
                    assert turn < 12, f"nothing was read by {transport}: {moved(head)}"
                    ask_all(head, reference, f"turn-{turn}", traffic(5000 + 100 * (turn % 4), 12))
                    turn += 1
                assert set(moved(head)) == {transport}
                head.run(idle(head.hub))
            wait_until(head, 2)
            head.run(idle(head.hub))
