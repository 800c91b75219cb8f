"""Every benchmark that needs nothing but this package: `make bench`. Results go to benchmarks/results, one file each.

    python -m benchmarks.run
    python -m benchmarks.run overheads engine

Against other systems: `python -m benchmarks.serving --help`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from kvasir.engine.random_model import make_checkpoint

RESULTS = Path(__file__).parent / "results"
NAMES = ("attention", "engine", "overheads", "gateway", "pool_node", "ssd")
NEEDS_MODEL = ("engine", "overheads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help=f"which ones (default: all of {', '.join(NAMES)})")
    names = parser.parse_args().names or NAMES
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "tiny"
        if any(name in NEEDS_MODEL for name in names):
            make_checkpoint(model, family="llama", size="tiny", seed=0)
        for name in names:
            print(f"== {name}", flush=True)
            flags = ["--model", str(model)] if name in NEEDS_MODEL else []
            out = subprocess.run(
                [sys.executable, "-m", f"benchmarks.{name}", "--json", *flags], stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            (RESULTS / f"{name}.json").write_text(out)
            print(out)


if __name__ == "__main__":
    main()
