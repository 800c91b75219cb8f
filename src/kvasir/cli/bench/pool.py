"""`kvasir bench pool`: what the KVCache pool reaches on this machine, over what the machine itself reaches in the same run."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvasir.cli.bench.pool_memory import measure_directory, measure_pool
from kvasir.cli.bench.pool_peers import PEERS, PeerRuns
from kvasir.cli.bench.pool_ssd import measure_ssd
from kvasir.cli.bench.pool_transfer import Measured, measure, ratios
from kvasir.cli.bench.sizes import MIB, size_name
from kvasir.core.errors import ConfigError
from kvasir.telemetry import logs

TRANSFER_MIB = 512
QUICK = 4
"""By how much less is moved with --quick."""


def pool(
    directory: Annotated[Path, typer.Option(help="On the disk to measure; 1 GiB of it is used and given back.")] = Path(),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, after one that warms up; figures are medians of ratios.")] = 5,
    peers: Annotated[
        Path | None,
        typer.Option(help="Python of an environment with Mooncake, NIXL, Redis, LMCache (benchmarks/peers/setup_transfer.sh)."),
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
    runs = [PeerRuns(name, peers) for name in PEERS] if peers is not None else []
    found = _measured(directory, runs, 1 if quick else rounds, QUICK if quick else 1, console)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def _measured(directory: Path, runs: list[PeerRuns], rounds: int, less: int, console: Console) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}",
        "load": round(os.getloadavg()[0], 2),
    }
    with console.status("put and get in one process"):
        speeds = measure_pool(working_set=256 * MIB // less, rounds=rounds)
    for name in ("put", "get"):
        found[f"shm_{name}_over_memcpy"] = {size_name(s.block_bytes): s.over_memcpy(getattr(s, name)) for s in speeds}
    moved = _transfers(runs, rounds, TRANSFER_MIB // less, console)
    over = ratios(moved)
    for name in ("put", "get"):
        found[f"tcp_{name}_over_socket"] = over[f"tcp_{name}_over_socket"]
        found[f"tcp_{name}_over_unpaced_socket"] = over[f"tcp_{name}_over_unpaced"]
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
    found["gb_per_s"] = {f"{m.name}, {size_name(m.nbytes)}": round(m.median, 3) for m in moved} | {
        f"{name}, {size_name(s.block_bytes)}": round(sorted(rates)[len(rates) // 2], 3)
        for s in speeds
        for name, rates in (("pool put", s.put), ("pool get", s.get))
    }
    if runs:
        found["ours_over_peers"] = {run.name: run.failure or run.ours_over(moved) for run in runs}
        found["peers_gb_per_s"] = {run.name: run.failure or run.medians() for run in runs}
    return found


def _transfers(runs: list[PeerRuns], rounds: int, mib: int, console: Console) -> list[Measured]:
    """Ours and the peers' in turn, so that a busy machine is busy for all of them."""
    moved: dict[tuple[str, int], tuple[float, ...]] = {}
    for number in range(rounds):
        with console.status(f"transfers between two processes, round {number + 1} of {rounds}"):
            for one in measure(working_set=mib * MIB, rounds=1):
                moved[one.name, one.nbytes] = (*moved.get((one.name, one.nbytes), ()), *one.rounds)
        for run in runs:
            with console.status(f"{run.name}, round {number + 1} of {rounds}"):
                run.run(mib)
    return [Measured(name, nbytes, all_rounds) for (name, nbytes), all_rounds in moved.items()]


def _ssd(directory: Path, rounds: int, less: int) -> dict[str, Any]:
    """Ratios by direction and block size, or why there are none: without direct I/O there is nothing to compare with."""
    try:
        with _scratch(directory) as scratch:
            figures = measure_ssd(scratch, turns=rounds, file_bytes=512 * MIB // less)
    except ConfigError as error:
        return {"ssd_not_measured": str(error)}
    found: dict[str, Any] = {}
    for figure in figures:
        for limit, over in (("direct", figure.over_direct), ("fio", figure.over_fio)):
            if over is not None:
                found.setdefault(f"ssd_{figure.direction}_over_{limit}", {})[size_name(figure.block_bytes)] = round(over, 3)
    return found


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvasir-bench-", dir=directory) as scratch:
        yield Path(scratch)


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
    for name, ratio in found.get("ours_over_peers", {}).items():
        console.print(f"over {name}: {ratio}")
