"""Blocks to and from the SSD through the pool's threads, over plain direct I/O and fio at the same size and depth.

    python -m benchmarks.ssd --directory ~ --json

Each turn writes and reads 1 GiB (256 MiB in blocks of 64 KiB) in each of the three ways, in another order every time; figures
are medians, minima and maxima over the turns, ratios medians of the turns' ratios. What is written is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path

from kvasir.cli.bench.pool_ssd import BLOCK_BYTES, measure_ssd
from kvasir.telemetry import logs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure (default: here)")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCK_BYTES), help="block sizes in bytes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logs.setup("warning", json=False)
    figures = measure_ssd(options.directory, block_bytes=options.blocks, depth=options.depth, turns=options.turns)
    if options.json:
        machine = {"date": str(date.today()), "kernel": platform.release(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
        json.dump(machine | {"command": " ".join(sys.argv), "figures": [f.to_json() for f in figures]}, sys.stdout, indent=1)
        print()
        return
    for figure in figures:
        rates = figure.to_json()["gb_per_s"]
        over = f"{figure.over_direct:.2f} of direct I/O" + (f", {figure.over_fio:.2f} of fio" if figure.over_fio else "")
        print(f"{figure.direction:5} {figure.block_bytes >> 10:6} KiB: {over}; GB/s (median, least, most) {rates}")


if __name__ == "__main__":
    main()
