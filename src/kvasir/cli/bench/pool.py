"""`kvasir bench pool`: what the KVCache pool reaches on this machine, over what the machine itself reaches in the same run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvasir.cli.bench.pool_memory import MIB, measure_directory, measure_pool
from kvasir.cli.bench.pool_ssd import measure_ssd
from kvasir.cli.bench.pool_transfer import measure, ratios
from kvasir.core.errors import ConfigError
from kvasir.telemetry import logs

PEERS = ("mooncake_transfer", "mooncake_store", "nixl_transfer", "redis_transfer")
PEER_S = 300.0
QUICK = 4
"""By how much less is moved with --quick."""


def pool(
    directory: Annotated[Path, typer.Option(help="On the disk to measure; 1 GiB of it is used and given back.")] = Path(),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, after one that warms up; figures are medians of ratios.")] = 5,
    peers: Annotated[
        Path | None,
        typer.Option(help="Python of an environment with Mooncake, NIXL and Redis (benchmarks/peers/setup_transfer.sh)."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the bytes and one round.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print nothing but JSON.")] = False,
) -> None:
    """Measure the KVCache pool: put and get, transfers between processes, the SSD tier, the index of blocks.

    Each figure is a ratio over a plain copy, a plain blocking socket, or plain direct I/O in the same run, for blocks of
    64 KiB, 1 MiB and 16 MiB, except those of the index, which are microseconds and bytes.

        kvasir bench pool --directory /mnt/nvme --json
    """
    if not directory.is_dir():
        raise ConfigError(f"--directory: {directory} is not a directory")
    logs.setup("warning", json=False)
    console = Console(stderr=True, quiet=as_json)
    found = _measured(directory, 1 if quick else rounds, QUICK if quick else 1, console)
    if peers is not None:
        found["peers_gb_per_s"] = {name: _peer(peers, name, console) for name in PEERS}
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def _measured(directory: Path, rounds: int, less: int, console: Console) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}",
        "load": round(os.getloadavg()[0], 2),
    }
    with console.status("put and get in one process"):
        speeds = measure_pool(working_set=256 * MIB // less, rounds=rounds)
    for name in ("put", "get"):
        found[f"shm_{name}_over_memcpy"] = {_size(s.block_bytes): s.over_memcpy(getattr(s, name)) for s in speeds}
    with console.status("transfers between two processes"):
        moved = measure(working_set=512 * MIB // less, rounds=rounds)
    over = ratios(moved)
    found["tcp_put_over_socket"] = over["tcp_put_over_socket"]
    found["tcp_get_over_socket"] = over["tcp_get_over_socket"]
    found["shm_read_over_memcpy"] = over["shm_get_over_memcpy"]
    with console.status("the SSD tier"):
        found |= _ssd(directory, rounds, less)
    with console.status("the index of blocks"):
        index = measure_directory(blocks=1_000_000 // less)
    found |= {
        "match_us": index.match_us,
        "insert_us": index.insert_us,
        "remove_us": index.remove_us,
        "bytes_per_entry": index.bytes_per_entry,
    }
    found["gb_per_s"] = {f"{m.name}, {_size(m.nbytes)}": round(m.median, 3) for m in moved} | {
        f"{name}, {_size(s.block_bytes)}": round(sorted(rates)[len(rates) // 2], 3)
        for s in speeds
        for name, rates in (("pool put", s.put), ("pool get", s.get))
    }
    return found


def _ssd(directory: Path, rounds: int, less: int) -> dict[str, Any]:
    """Ratios by direction and block size, or why there are none: without direct I/O there is nothing to compare with."""
    try:
        with _scratch(directory) as scratch:
            figures = measure_ssd(scratch, turns=rounds, file_bytes=512 * MIB // less)
    except ConfigError as error:
        return {"ssd_not_measured": str(error)}
    return {
        f"ssd_{direction}_over_direct": {
            _size(figure.block_bytes): round(figure.over_direct, 3) for figure in figures if figure.direction == direction
        }
        for direction in ("write", "read")
    }


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvasir-bench-", dir=directory) as scratch:
        yield Path(scratch)


def _size(num_bytes: int) -> str:
    return f"{num_bytes // MIB} MiB" if num_bytes >= MIB else f"{num_bytes // 1024} KiB"


def _peer(python: Path, name: str, console: Console) -> dict[str, float] | str:
    """GB/s by way and size; why not, where the peer is not installed or fails."""
    with console.status(name):
        try:
            done = subprocess.run(
                [str(python), "-m", f"benchmarks.peers.{name}", "512"], capture_output=True, timeout=PEER_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"did not run: {error}"
    if done.returncode:
        return f"did not run: exit status {done.returncode}"
    speeds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return speeds


def _show(found: dict[str, Any]) -> None:
    table = Table(title=f"KVCache pool on {found['machine']} (load {found['load']})")
    for name in ("", "64 KiB", "1 MiB", "16 MiB"):
        table.add_column(name, justify="right" if name else "left")
    for name, value in found.items():
        if isinstance(value, dict) and "1 MiB" in value:
            table.add_row(name, *(f"{value[size]:.2f}" for size in ("64 KiB", "1 MiB", "16 MiB")))
    console = Console()
    console.print(table)
    console.print(
        f"index of blocks, 64 nodes: match of 2,048 keys {found['match_us']} us, insert {found['insert_us']} us a block,"
        f" remove {found['remove_us']} us, {found['bytes_per_entry']} bytes an entry"
    )
    if (reason := found.get("ssd_not_measured")) is not None:
        console.print(f"the SSD tier was not measured: {reason}")
    for name, speeds in found.get("peers_gb_per_s", {}).items():
        console.print(f"{name}: {speeds}")
