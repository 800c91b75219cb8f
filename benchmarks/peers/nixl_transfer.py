"""NIXL over UCX between two processes: `python -m benchmarks.peers.nixl_transfer [MIB]`; UCX chooses how, or UCX_TLS."""

from __future__ import annotations

import os
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.peers import timing


def main() -> None:
    nbytes = timing.working_set()
    with timing.second_process(serve, nbytes) as (metadata, base):
        agent, memory = start("reader", nbytes)
        remote = agent.add_remote_agent(metadata)
        move = partial(transfer, agent, remote, timing.address(memory), base)
        ways = {
            "put": (partial(move, "WRITE"), 1),
            "get": (partial(move, "READ"), 1),
            "put_batch16": (partial(move, "WRITE"), timing.BATCH),
            "get_batch16": (partial(move, "READ"), timing.BATCH),
        }
        timing.report(ways, nbytes)
    os._exit(0)  # NIXL crashes while its process ends in order


def serve(connection: Connection, nbytes: int) -> None:
    agent, memory = start("source", nbytes)
    connection.send((agent.get_agent_metadata(), timing.address(memory)))
    while not connection.poll(0.0005):  # without a thread of its own it makes progress only when it is asked
        agent.get_new_notifs()


def start(name: str, nbytes: int) -> tuple[Any, Any]:
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    from nixl._api import nixl_agent, nixl_agent_config  # reads the environment

    agent, memory = nixl_agent(name, nixl_agent_config(enable_prog_thread=False)), timing.warm(nbytes)
    agent.register_memory([(timing.address(memory), nbytes, 0, name)], "DRAM")
    return agent, memory


def transfer(agent: Any, remote: str, here: int, base: int, op: str, offsets: list[int], size: int) -> None:
    ours = agent.get_xfer_descs([(here + at, size, 0) for at in offsets], "DRAM")
    theirs = agent.get_xfer_descs([(base + at, size, 0) for at in offsets], "DRAM")
    handle = agent.initialize_xfer(op, ours, theirs, remote, b"")
    state = agent.transfer(handle)
    while state == "PROC":
        state = agent.check_xfer_state(handle)
    if state != "DONE":
        raise RuntimeError(f"NIXL answered {state}")
    agent.release_xfer_handle(handle)


if __name__ == "__main__":
    main()
